"""Grids of images: what helped and hurt a prediction, and which labels look wrong.

Shapes: m test images, n training images, k of them per test image. An image is ``[height, width]``,
or ``[channels, height, width]`` with 1 or 3 channels. Three channels are colours between 0 and 1
(or 8-bit integers); one channel may have any range, drawn from its lowest to its highest value.
"""

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor

from influence_kit.core.arguments import check_count, check_sequence, check_texts, shown
from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation.arrays import as_tensor, marks
from influence_kit.scoring.reducers import KMostInfluentialResults
from influence_kit.viz.captions import Heads, heads_of, label_text, score_text
from influence_kit.viz.colours import NEUTRAL, RIGHT, WRONG
from influence_kit.viz.top_results import checked_heads, checked_results

Images = Tensor | np.ndarray | Sequence[Any]

# sizes that stay legible with eleven thumbnails side by side on a page
INCHES, LINE_INCHES, FONT, LETTERS = 1.0, 0.14, 8, 16
GAP = 0.2  # between groups of thumbnails, in thumbnails


def proponents_and_opponents(
    queries: Images,
    query_titles: Sequence[str],
    proponents: KMostInfluentialResults,
    opponents: KMostInfluentialResults,
    train_images: Images,
    train_labels: Sequence[Any] | Tensor,
    is_wrong: Sequence[bool] | Tensor | None = None,
    cmap: str = "gray",
    heads: Heads | None = None,
    method: object = None,
) -> Figure:
    """One row per test image: the image, its k proponents and its k opponents, best first.

    Args:
        queries: the test images ``[m, ...]``.
        query_titles: of the test images, ``[m]``; may have several lines.
        proponents: what ``influence(..., k=k)`` returned for the test images.
        opponents: what ``influence(..., k=k, proponents=False)`` returned.
        train_images: the training images ``[n, ...]``, or any sequence of them.
        train_labels: their labels ``[n]``, shown by ``str``.
        is_wrong: where known, whether each label is wrong, ``[n]``; wrong ones are framed and
            marked "wrong".
        cmap: the matplotlib colormap of images with one channel; "gray_r" draws 0 as white.
        heads: what to write above proponents and opponents; None for what ``method`` explains.
        method: the method that gave the scores. With a ``test_output_fn``, proponents raised the
            output; without one, or where None, they lowered the loss.

    Raises:
        InvalidArgumentError: if the numbers of images, titles and results differ, or an image
            cannot be drawn.
    """
    heads = heads_of(checked_heads(heads), method)
    m = len(check_sequence(queries, "queries", "images"))
    query_titles = check_texts(query_titles, "query_titles", "one title per image")
    n = len(check_sequence(train_images, "train_images", "images"))
    check_sequence(train_labels, "train_labels", "labels, one per training image", n)
    if is_wrong is not None:
        is_wrong = marks(is_wrong, "is_wrong", "[n]", "True where the label is wrong")
        check_sequence(is_wrong, "is_wrong", "one per training image", n)
    check_cmap(cmap)
    proponents = checked_results(proponents, "proponents", n)
    opponents = checked_results(opponents, "opponents", n)
    _check_rows(m, len(query_titles), proponents, opponents)
    shown = [proponents, opponents]
    columns = [max(results.indices.shape[1], 1) for results in shown]
    widths = [1.1, GAP, columns[0], GAP, columns[1]]
    figure = _figure(INCHES * 1.1 * sum(widths), (INCHES + 4 * LINE_INCHES) * m + 0.4)
    left, *sides = figure.subfigures(1, 5, width_ratios=widths, squeeze=False)[0, ::2]
    left.suptitle("test image", fontsize=10, weight="bold")
    for axes, image, title in zip(_grid(left, m, 1).flat, queries, query_titles, strict=True):
        _draw(axes, image, title, cmap)
    for side, head, results in zip(sides, heads, shown, strict=True):
        side.suptitle(head, fontsize=10, weight="bold")
        _draw_results(side, results, train_images, train_labels, is_wrong, cmap)
    return figure


def suspects(
    images: Images,
    titles: Sequence[str],
    given_labels: Sequence[Any] | Tensor,
    true_labels: Sequence[Any] | Tensor | None = None,
    columns: int = 8,
    cmap: str = "gray",
) -> Figure:
    """The training images whose labels look most wrong, in the given order, row by row.

    Args:
        images: the suspicious images ``[m, ...]``, the most suspicious first.
        titles: of the images, ``[m]``, such as their indices and scores.
        given_labels: the labels they were trained with, ``[m]``, shown by ``str``.
        true_labels: the correct labels, ``[m]``, where known. A label that differs is marked
            "wrong" and framed, one that agrees is marked "right".
        columns: images per row.
        cmap: the matplotlib colormap of images with one channel; "gray_r" draws 0 as white.

    Raises:
        InvalidArgumentError: if the numbers differ, or an image cannot be drawn.
    """
    m = len(check_sequence(images, "images", "images"))
    titles = check_texts(titles, "titles", "one title per image")
    check_sequence(given_labels, "given_labels", "one label per image")
    if true_labels is not None:
        check_sequence(true_labels, "true_labels", "one label per image")
    check_count(columns, "columns", least=0)
    check_cmap(cmap)
    counts = {"titles": len(titles), "given_labels": len(given_labels)}
    if true_labels is not None:
        counts["true_labels"] = len(true_labels)
    wrong_counts = {name: count for name, count in counts.items() if count != m}
    if m == 0 or wrong_counts or columns < 1:
        raise InvalidArgumentError(
            f"got {m} images, {counts} and {columns} columns; there must be at least one image and "
            "one column, and one title and label per image"
        )
    columns = min(columns, m)
    rows = -(-m // columns)
    figure = _figure(INCHES * 1.1 * columns, (INCHES + 4.5 * LINE_INCHES) * rows)
    for index, axes in enumerate(_grid(figure, rows, columns).flat):
        if index >= m:
            axes.set_visible(False)
            continue
        true = None if true_labels is None else true_labels[index]
        text, colour = _verdict(given_labels[index], true)
        _draw(axes, images[index], f"{titles[index]}\n{text}", cmap, colour)
    return figure


def _verdict(given: Any, true: Any) -> tuple[str, str]:
    """The text below an image about its label, and its colour."""
    if true is None:
        return f"label {label_text(given)}", NEUTRAL
    if label_text(given) == label_text(true):
        return f"label {label_text(given)}: right", RIGHT
    return f"label {label_text(given)}: wrong\n(it is {label_text(true)})", WRONG


def _check_rows(
    m: int, titles: int, proponents: KMostInfluentialResults, opponents: KMostInfluentialResults
) -> None:
    counts = {
        "query_titles": titles,
        "proponents": len(proponents.indices),
        "opponents": len(opponents.indices),
    }
    if m == 0 or set(counts.values()) != {m}:
        raise InvalidArgumentError(
            f"got {m} test images, and {counts}; there must be at least one test image, and one "
            "title and one row of each result per test image"
        )


def _draw_results(
    side: SubFigure,
    results: KMostInfluentialResults,
    images: Images,
    labels: Sequence[Any] | Tensor,
    is_wrong: Sequence[bool] | Tensor | None,
    cmap: str,
) -> None:
    m, k = results.indices.shape
    if k == 0:
        return
    indices = results.indices.flatten().tolist()
    scores = results.influence_scores.flatten().tolist()
    for axes, index, score in zip(_grid(side, m, k).flat, indices, scores, strict=True):
        wrong = is_wrong is not None and bool(is_wrong[index])
        label = f"label {label_text(labels[index])}{', wrong' if wrong else ''}"
        colour = WRONG if wrong else NEUTRAL
        _draw(axes, images[index], f"#{index}\n{score_text(score)}\n{label}", cmap, colour)


def check_cmap(cmap: Any) -> None:
    """Refuse what is not the name of a matplotlib colormap."""
    if not isinstance(cmap, str) or cmap not in colormaps:
        raise InvalidArgumentError(
            f"`cmap` must be a name in matplotlib.colormaps, such as 'gray'; got {shown(cmap)}"
        )


def _figure(width: float, height: float) -> Figure:
    pads = ConstrainedLayoutEngine(w_pad=0.04, h_pad=0.06)
    return Figure(figsize=(width, height), layout=pads)


def _grid(figure: Figure | SubFigure, rows: int, columns: int) -> np.ndarray:
    return figure.subplots(rows, columns, squeeze=False)


def _draw(axes: Axes, image: Any, title: str, cmap: str, colour: str = NEUTRAL) -> None:
    """Draw one image with its title, framed in a colour that marks something wrong."""
    axes.imshow(pixels_of(image), cmap=cmap, interpolation="nearest")
    wrapped = [textwrap.fill(line, LETTERS, break_on_hyphens=False) for line in title.splitlines()]
    # a dollar sign is not the beginning of a formula
    axes.set_title("\n".join(wrapped), fontsize=FONT, color=colour, parse_math=False)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(colour if colour != NEUTRAL else "#bbbbbb")
        spine.set_linewidth(2.5 if colour == WRONG else 0.8)


def pixels_of(image: Any) -> np.ndarray:
    """An image as matplotlib lays it out: ``[height, width]`` or ``[height, width, channels]``."""
    tensor = as_tensor(image, "an image", "numbers [height, width] or [channels, height, width]")
    if tensor.numel() == 0 or not bool(torch.isfinite(tensor).all()):
        kind = "no pixels" if tensor.numel() == 0 else "pixels that are not finite"
        raise InvalidArgumentError(f"an image of shape {list(tensor.shape)} has {kind}")
    pixels: np.ndarray = tensor.float().numpy()
    if pixels.ndim == 2:
        return pixels
    if pixels.ndim != 3 or pixels.shape[0] not in (1, 3):
        raise InvalidArgumentError(
            f"an image has shape {list(pixels.shape)}; expected [height, width], or [channels, "
            "height, width] with 1 or 3 channels"
        )
    pixels = np.moveaxis(pixels, 0, -1)
    if tensor.dtype == torch.uint8:
        return pixels / 255
    if pixels.shape[-1] == 3 and not (pixels.min() >= 0 and pixels.max() <= 1):
        raise InvalidArgumentError(
            f"an image of 3 channels has values from {pixels.min():.3g} to {pixels.max():.3g}; "
            "expected 0 to 1 (or 8-bit integers): undo its normalization first"
        )
    return pixels
