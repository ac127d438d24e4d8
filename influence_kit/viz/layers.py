"""Scores split by layer. Shapes: p pairs of a test and a training example."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from influence_kit.core.arguments import check_mapping, check_texts
from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation.arrays import Values, numbers
from influence_kit.viz.captions import score_text
from influence_kit.viz.colours import NEGATIVE, POSITIVE

PANEL, BAR_INCHES, MARGIN = 2.6, 0.3, 1.0
SPACE = 0.5  # for the number at the end of a bar, as a share of the longest bar


def layer_bars(by_layer: Mapping[str, Values], titles: Sequence[str]) -> Figure:
    """The contribution of each layer to the score of each pair: one panel per pair.

    Each panel has its own scale, since scores of different test examples do not compare.

    Args:
        by_layer: ``{layer: its contribution to the score of each pair}``, ``[p]`` each, from the
            result of ``influence_by_layer``.
        titles: of the panels, ``[p]``; may have several lines.

    Raises:
        InvalidArgumentError: for no layer, or where the numbers of titles and scores differ.
    """
    by_layer = check_mapping(by_layer, "by_layer", "{layer: scores of the pairs [p]}")
    titles = check_texts(titles, "titles", "one title per pair")
    parts = [numbers(values, f"the scores of '{name}'", "[p]") for name, values in by_layer.items()]
    lengths = {name: len(part) for name, part in zip(by_layer, parts, strict=True)}
    if set(lengths.values()) != {len(titles)}:
        raise InvalidArgumentError(
            f"got {len(titles)} titles, and scores of {lengths} pairs; there must be one title per "
            "pair"
        )
    rows = range(len(parts))
    size = (1.2 + PANEL * len(titles), BAR_INCHES * len(parts) + MARGIN)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(ncols=len(titles), sharey=True, squeeze=False)[0]
    for pair, (axes, title) in enumerate(zip(panels, titles, strict=True)):
        values = [float(part[pair]) for part in parts]
        colours = [POSITIVE if value >= 0 else NEGATIVE for value in values]
        bars = axes.barh(rows, values, 0.65, color=colours)
        axes.bar_label(bars, [score_text(value) for value in values], padding=3, fontsize=8)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_xlim(*_with_space(values))
        axes.tick_params(length=0)
        axes.set_title(f"{title}\nsum {score_text(sum(values))}", fontsize=9)
        axes.set_xticks([])
        axes.set_yticks(rows, list(by_layer))
    panels[0].set_ylim(len(parts) - 0.5, -0.5)
    return figure


def _with_space(values: Sequence[float]) -> tuple[float, float]:
    """The limits of an axis of bars, with space for the numbers at their ends."""
    low, high = min(*values, 0.0), max(*values, 0.0)
    space = SPACE * (high - low or 1.0)
    return low - space * any(value < 0 for value in values), high + space * any(
        value >= 0 for value in values
    )
