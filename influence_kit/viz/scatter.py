"""Predicted against actual changes. Shapes: m test examples, k training examples."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from influence_kit.core.arguments import check_mapping, check_text, shown
from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation.arrays import Values, as_tensor, numbers
from influence_kit.evaluation.correlation import spearman
from influence_kit.viz.colours import BLUE, GREY, ORANGE

INCHES = 3.4


def predicted_and_actual(
    pairs: Mapping[str, tuple[Values, Values]],
    predicted_is: str = "predicted change",
    actual_is: str = "actual change",
) -> Figure:
    """One panel per title: predicted changes on the x axis, actual changes on the y axis.

    Influences span many powers of ten and both signs: the two axes share a scale, which is linear
    for the smaller half of the values, around zero, and logarithmic beyond. On the dashed line,
    predicted and actual changes are equal. The slope of the orange line is the median over test
    examples of the least-squares slope: above 1, predictions are too small. The rank correlation is
    the mean over test examples, as in ``loo_correlation``.

    Args:
        pairs: ``{title: (predicted, actual)}``, ``[k]``, or ``[m, k]``, one row per test example.
        predicted_is: the label of the x axis: what is predicted, and its unit.
        actual_is: the label of the y axis.

    Raises:
        InvalidArgumentError: for no pairs, shapes that differ, values that are not finite, or a
            test example whose predictions are all zero.
    """
    check_text(predicted_is, "predicted_is")
    check_text(actual_is, "actual_is")
    named = check_mapping(pairs, "pairs", "{title: (predicted, actual)}")
    checked = {title: _checked(title, pair) for title, pair in named.items()}
    figure = Figure(figsize=(INCHES * len(pairs) + 0.3, INCHES + 0.5), layout="constrained")
    panels = figure.subplots(ncols=len(pairs), squeeze=False)[0]
    for axes, (title, (predicted, actual)) in zip(panels, checked.items(), strict=True):
        _draw(axes, predicted, actual)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(predicted_is)
    panels[0].set_ylabel(actual_is)
    return figure


def _checked(title: str, pair: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise InvalidArgumentError(
            f"'{title}' must be a pair (predicted, actual); got {shown(pair)}"
        )
    predicted, actual = pair
    name = f"the predictions of '{title}'"
    shape = "[m, k]" if as_tensor(predicted, name, "numbers").dim() == 2 else "[k]"
    left = numbers(predicted, name, shape)
    right = numbers(actual, f"the actual changes of '{title}'", shape)
    if left.shape != right.shape:
        raise InvalidArgumentError(
            f"'{title}' has predicted changes of shape {list(left.shape)} and actual changes of "
            f"{list(right.shape)}; both must be [k] or [m, k]"
        )
    left, right = (side.view(-1, side.shape[-1]) for side in (left, right))
    zero = torch.nonzero(~left.any(dim=1)).flatten()
    if len(zero):
        raise InvalidArgumentError(
            f"the predictions of '{title}' for test example {int(zero[0])} are all zero, so that "
            "no slope is defined: leave it out"
        )
    return left, right


def _draw(axes: Axes, predicted: Tensor, actual: Tensor) -> None:
    slope = float(((predicted * actual).sum(1) / predicted.square().sum(1)).median())
    correlation = float(spearman(predicted, actual).mean())
    _set_scales(axes, torch.cat([predicted.flatten(), actual.flatten()]).abs())
    # many points are drawn small and transparent
    size, opacity = (12, 0.7) if predicted.numel() <= 1000 else (4, 0.2)
    dots = predicted.flatten().numpy(), actual.flatten().numpy()
    axes.scatter(*dots, size, color=BLUE, alpha=opacity, linewidth=0)
    # through many points, since lines are curved on these axes
    low, high = axes.get_xlim()
    half = np.geomspace(high / 1e8, high, 200)
    along = np.concatenate([-half[::-1], [0.0], half])
    axes.plot(along, along, color=GREY, linestyle="--", linewidth=1.2)
    axes.plot(along, slope * along, color=ORANGE, linewidth=1.5)
    axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
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


def _set_scales(axes: Axes, sizes: Tensor) -> None:
    """Give both axes the same scale and ticks, for values of these absolute sizes."""
    limit, linear = float(sizes.max()), float(sizes[sizes > 0].median())
    highest, lowest = (math.floor(math.log10(size)) for size in (limit, linear))
    step = max(2, math.ceil((highest - lowest) / 2))
    powers = [10.0**power for power in range(highest, lowest, -step)] or [10.0**highest]
    ticks = [*(-power for power in powers), 0.0, *reversed(powers)]
    axes.axhline(0, color=GREY, linewidth=0.6)
    axes.axvline(0, color=GREY, linewidth=0.6)
    axes.set_xscale("symlog", linthresh=linear)
    axes.set_yscale("symlog", linthresh=linear)
    axes.set_xticks(ticks)
    axes.set_yticks(ticks)
    axes.set(xlim=(-1.5 * limit, 1.5 * limit), ylim=(-1.5 * limit, 1.5 * limit))
