"""Predictions against what happened. Letters: m test and k training examples."""

from collections.abc import Mapping

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation.arrays import Values, numbers
from influence_kit.evaluation.correlation import spearman
from influence_kit.viz.colours import BLUE, GREY, ORANGE

INCHES = 3.4


def predicted_and_actual(
    pairs: Mapping[str, tuple[Values, Values]],
    predicted_is: str = "predicted change",
    actual_is: str = "actual change",
) -> Figure:
    """A panel for each name: what was predicted to the right, what happened upwards.

    Both axes of a panel have one scale. On the dashed line both are equal. The orange line through
    the origin fits best; its slope says by how much predictions are too small (above 1) or too
    large (below 1). The rank correlation is the mean over rows, as ``loo_correlation`` has it.

    Args:
        pairs: ``{title: (predicted, actual)}``, ``[k]``, or ``[m, k]`` with a row a test example.
        predicted_is: what the predictions are, and their unit.
        actual_is: the same of what happened.

    Raises:
        InvalidArgumentError: for nothing to draw, shapes that differ, values that are not finite,
            or predictions that are all zero.
    """
    if not pairs:
        raise InvalidArgumentError("got nothing to draw; pass {title: (predicted, actual)}")
    checked = {title: _checked(title, *pair) for title, pair in pairs.items()}
    figure = Figure(figsize=(INCHES * len(pairs) + 0.3, INCHES + 0.5), layout="constrained")
    panels = figure.subplots(ncols=len(pairs), squeeze=False)[0]
    for axes, (title, (predicted, actual)) in zip(panels, checked.items(), strict=True):
        _draw(axes, predicted, actual)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(predicted_is)
    panels[0].set_ylabel(actual_is)
    return figure


def _checked(title: str, predicted: Values, actual: Values) -> tuple[Tensor, Tensor]:
    shape = "[m, k]" if torch.as_tensor(predicted).dim() == 2 else "[k]"
    left = numbers(predicted, f"the predictions of '{title}'", shape)
    right = numbers(actual, f"what happened in '{title}'", shape)
    if left.shape != right.shape:
        raise InvalidArgumentError(
            f"'{title}' has predictions of shape {list(left.shape)}, and what happened of "
            f"{list(right.shape)}; both must be [k] or [m, k]"
        )
    if not bool(left.any()):
        raise InvalidArgumentError(f"all predictions of '{title}' are zero: there is no slope")
    return left.view(-1, left.shape[-1]), right.view(-1, left.shape[-1])


def _draw(axes: Axes, predicted: Tensor, actual: Tensor) -> None:
    """Both axes are linear around zero, within the smaller half of the values, then logarithmic."""
    slope = float(((predicted * actual).sum(1) / predicted.square().sum(1)).nanmedian())
    correlation = float(spearman(predicted, actual).mean())
    sizes = torch.cat([predicted.flatten(), actual.flatten()]).abs()
    limit, linear = float(sizes.max()), float(sizes[sizes > 0].median())
    axes.set_xscale("symlog", linthresh=linear)
    axes.set_yscale("symlog", linthresh=linear)
    # many points are drawn small and see-through
    size, opacity = (12, 0.7) if predicted.numel() <= 1000 else (4, 0.2)
    axes.axhline(0, color=GREY, linewidth=0.6)
    axes.axvline(0, color=GREY, linewidth=0.6)
    axes.scatter(predicted.flatten(), actual.flatten(), size, color=BLUE, alpha=opacity, linewidth=0)
    # a straight line through the origin is none on these axes
    along = np.concatenate([-np.geomspace(limit, linear / 10, 60), np.geomspace(linear / 10, limit, 60)])
    axes.plot(along, along, color=GREY, linestyle="--", linewidth=1.2)
    axes.plot(along, slope * along, color=ORANGE, linewidth=1.5)
    axes.set(xlim=(-1.3 * limit, 1.3 * limit), ylim=(-1.3 * limit, 1.3 * limit), aspect="equal")
    axes.text(
        0.03,
        0.97,
        f"rank correlation {correlation:.2f}\nslope {slope:.2f}",
        transform=axes.transAxes,
        verticalalignment="top",
        fontsize=9,
        bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 2},
    )
    axes.grid(alpha=0.3)
