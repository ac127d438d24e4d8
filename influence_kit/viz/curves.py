"""Detection curves: how fast wrong labels are found."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from influence_kit.core.arguments import check_mapping, check_number
from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation.arrays import pair_of_numbers
from influence_kit.viz.colours import GREY

Curve = tuple[Tensor | np.ndarray | Sequence[float], Tensor | np.ndarray | Sequence[float]]
# dashes as well as colours, since good curves overlap
STYLES = ("-", "--", "-.", ":")


def detection_curves(curves: Mapping[str, Curve], until: float = 1.0) -> Figure:
    """The share of wrong labels found against the share of examples inspected, one line per score.

    The dotted diagonal is what inspecting in random order finds on average.

    Args:
        curves: ``{name: (inspected, found)}``, as ``evaluation.detection_curve`` returns them:
            shares between 0 and 1.
        until: the share inspected at which the figure ends, above 0 and at most 1.

    Raises:
        InvalidArgumentError: for no curve, a curve whose halves differ in length, values outside
            0 to 1, or an ``until`` outside (0, 1].
    """
    named = check_mapping(curves, "curves", "{name: (inspected, found)}")
    check_number(until, "until", above=0, most=1)
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    for number, (name, pair) in enumerate(named.items()):
        inspected, found = pair_of_numbers(pair, f"the curve '{name}'", "(inspected, found)", "[c]")
        shares = torch.cat([inspected, found])
        if shares.min() < 0 or shares.max() > 1:
            raise InvalidArgumentError(
                f"the curve '{name}' has values from {shares.min():.3g} to {shares.max():.3g}; "
                "both halves are shares, between 0 and 1"
            )
        if len(inspected) != len(found):
            raise InvalidArgumentError(
                f"the curve '{name}' has {len(inspected)} shares inspected and {len(found)} found; "
                "both must have the same length"
            )
        axes.plot(inspected, found, STYLES[number % len(STYLES)], linewidth=2, label=name)
    axes.plot([0, 1], [0, 1], ":", color=GREY, linewidth=1.2, label="random order")
    axes.set(xlim=(0, until), ylim=(0, 1.02))
    axes.set_xlabel("training examples inspected, highest score first")
    axes.set_ylabel("wrong labels found")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
    axes.grid(alpha=0.3)
    axes.legend(loc="center right")
    return figure
