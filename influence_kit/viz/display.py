"""How the report shows an example: as an image, a text, or numbers with their names.

Everything is embedded in the page and limited in size: the pixels of an image, the characters of a
text, the numbers of a row. The page notes what is left out.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import imsave
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from influence_kit.core.arguments import shown as shown_value
from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation.arrays import as_tensor
from influence_kit.viz.images import pixels_of

# the longest side of an embedded image, in pixels; the page shows it at two thirds or larger
SIDE, QUERY_SIDE = 96, 240
MOST_NUMBERS, DPI = 40, 130
# without matplotlib's version, so that equal pixels give equal bytes
METADATA = {"Software": "influence_kit"}


class Shown(NamedTuple):
    """One of an image, a text and numbers.

    Attributes:
        image: an image as a data URL.
        enlarged: whether the page enlarges the image, because it is small.
        text: the text, or its beginning.
        numbers: names and values.
        rest: a note about the parts that are left out; empty if there are none.
    """

    image: str | None = None
    enlarged: bool = False
    text: str | None = None
    numbers: Sequence[tuple[str, str]] = ()
    rest: str = ""


@dataclass(frozen=True)
class Display:
    """The settings by which examples are shown.

    Attributes:
        feature_names: names of the numbers of a row; None for their indices.
        cmap: the matplotlib colormap of images with one channel.
        letters: how many characters of a text to show at most.
    """

    feature_names: Sequence[str] | None
    cmap: str
    letters: int

    def shown(self, example: Any, side: int = SIDE) -> Shown:
        """Show a ``str`` as text, ``[features]`` as numbers, anything else as an image.

        Args:
            example: what to show.
            side: the longest side of an image, in pixels.

        Raises:
            InvalidArgumentError: for what is none of the three, or where the numbers of features
                and names differ.
        """
        if isinstance(example, str):
            return self._text(str.__str__(example))
        try:
            values = as_tensor(example, "an example", "numbers")
        except InvalidArgumentError as error:
            raise InvalidArgumentError(
                f"an example is {shown_value(example)}, which is not a tensor; expected a text, "
                "numbers [features], or an image (the input alone, without its label)"
            ) from error
        if values.dim() <= 1:
            return self._numbers(values.flatten())
        rgb = _eight_bits(pixels_of(values), self.cmap)
        return Shown(png_address(shrunk(rgb, side)), enlarged=1.5 * max(rgb.shape[:2]) < side)

    def _text(self, text: str) -> Shown:
        left_out = len(text) - self.letters
        if left_out <= 0:
            return Shown(text=text if text.strip() else "(empty)")
        return Shown(text=text[: self.letters], rest=f"... and {left_out} more characters")

    def _numbers(self, values: Tensor) -> Shown:
        names = self.feature_names
        if names is not None and len(names) != len(values):
            raise InvalidArgumentError(
                f"an example has {len(values)} numbers, and there are {len(names)} feature_names; "
                "there must be one name per number"
            )
        form = ".4g" if values.is_floating_point() else ""
        written = [
            (str(i) if names is None else names[i], f"{value:{form}}")
            for i, value in enumerate(values[:MOST_NUMBERS].tolist())
        ]
        left_out = len(values) - len(written)
        return Shown(numbers=written, rest=f"... and {left_out} more numbers" if left_out else "")


def _eight_bits(image: np.ndarray, cmap: str) -> np.ndarray:
    """8-bit colours ``[height, width, 3]``, as ``imshow`` draws them."""
    if image.ndim == 2 or image.shape[-1] == 1:
        plane = image.reshape(image.shape[:2])
        image = np.asarray(colormaps[cmap](Normalize()(plane)))[..., :3]
    rounded: np.ndarray = np.rint(image * 255).astype(np.uint8)
    return rounded


def shrunk(rgb: np.ndarray, side: int) -> np.ndarray:
    """The image with at most ``side`` pixels per side, each the mean of the area that it covers."""
    longest = max(rgb.shape[:2])
    if longest <= side:
        return rgb
    height, width = (max(1, round(length * side / longest)) for length in rgb.shape[:2])
    planes = torch.from_numpy(rgb).permute(2, 0, 1).double()
    means = adaptive_avg_pool2d(planes, (height, width)).round()
    smaller: np.ndarray = means.byte().permute(1, 2, 0).numpy()
    return smaller


def png_address(rgb: np.ndarray) -> str:
    """An image ``[height, width, 3]`` as a data URL."""
    file = io.BytesIO()
    imsave(file, np.ascontiguousarray(rgb), format="png", metadata=METADATA)
    return _address(file)


def figure_address(figure: Figure) -> str:
    """A figure as a data URL."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI, metadata=METADATA)
    return _address(file)


def _address(file: io.BytesIO) -> str:
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
