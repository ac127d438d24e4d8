"""Self-influence, the highest first. Shapes: n training examples."""

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from influence_kit.core.arguments import check_count, check_texts
from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation.arrays import Values, marks, numbers
from influence_kit.viz.colours import GREY, NEUTRAL, RIGHT, WRONG

BAR_INCHES, MARGIN = 0.21, 1.0


def self_influence_ranking(
    scores: Values,
    names: Sequence[str] | None = None,
    is_wrong: Sequence[bool] | Tensor | None = None,
    first: int = 20,
) -> Figure:
    """The examples with the highest scores by name, and beside them all scores in descending order.

    Args:
        scores: of the training examples, ``[n]``: the result of ``self_influence()``, or any other
            suspicion.
        names: of the examples, ``[n]``; None for their indices, such as "#12".
        is_wrong: where known, whether each label is wrong, ``[n]``; wrong ones are coloured.
        first: how many examples to name, at least 1.

    Raises:
        InvalidArgumentError: for scores that are not finite, another number of names or marks, or a
            ``first`` below 1.
    """
    values = numbers(scores, "scores", "[n]")
    n = len(values)
    check_count(first, "first", least=0)
    if names is not None:
        names = check_texts(names, "names", "one name per example")
    if is_wrong is not None:
        is_wrong = marks(is_wrong, "is_wrong", "[n]", "True where the label is wrong")
    counts = {
        name: len(given)
        for name, given in (("names", names), ("is_wrong", is_wrong))
        if given is not None
    }
    if any(count != n for count in counts.values()) or first < 1:
        raise InvalidArgumentError(
            f"got {n} scores, {counts} and first={first}; there must be one of each per example, "
            "and at least one to name"
        )
    order = torch.argsort(values, descending=True, stable=True).tolist()
    wrong = [False] * n if is_wrong is None else [bool(mark) for mark in is_wrong]
    first = min(first, n)
    height = max(BAR_INCHES * first, 2.5) + MARGIN
    figure = Figure(figsize=(9.0, height), layout="constrained")
    bars, whole = figure.subplots(ncols=2, width_ratios=[1.25, 1])
    named = [f"#{i}" if names is None else names[i] for i in order[:first]]
    _draw_bars(bars, values[order[:first]].numpy(), named, [wrong[i] for i in order[:first]])
    _draw_all(whole, values[order].numpy(), np.array([wrong[i] for i in order]), first)
    if is_wrong is not None:
        whole.legend(loc="upper right", fontsize=9)
    return figure


def _draw_bars(axes: Axes, values: np.ndarray, names: Sequence[str], wrong: list[bool]) -> None:
    rows = range(len(values))
    axes.barh(rows, values, 0.7, color=[WRONG if mark else RIGHT for mark in wrong])
    axes.set_yticks(rows, names, fontsize=8, parse_math=False)
    for tick, mark in zip(axes.get_yticklabels(), wrong, strict=True):
        tick.set_color(WRONG if mark else NEUTRAL)
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.set_title(f"the {len(values)} highest", fontsize=10)
    axes.set_xlabel("score")
    axes.grid(axis="x", alpha=0.3)


def _draw_all(axes: Axes, values: np.ndarray, wrong: np.ndarray, first: int) -> None:
    rank = np.arange(1, len(values) + 1)
    axes.plot(rank, values, color=GREY, linewidth=1)
    for mark, colour, name in ((False, RIGHT, "label right"), (True, WRONG, "label wrong")):
        chosen = wrong == mark
        # wrong ones are fewer, and drawn on top
        axes.plot(rank[chosen], values[chosen], ".", color=colour, markersize=4, label=name)
    axes.axvspan(0, first + 0.5, color=GREY, alpha=0.15, linewidth=0)
    if values.min() > 0:
        axes.set_yscale("log")
    axes.set_xlim(0, len(values) + 1)
    axes.set_title(f"all {len(values)} (shaded: those on the left)", fontsize=10)
    axes.set_xlabel("rank")
    axes.grid(alpha=0.3)
