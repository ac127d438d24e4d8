"""Scores split by layer. Letters: p pairs of a test and a training example."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from influence_kit.core.arguments import check_mapping, check_texts
from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation.arrays import Values, numbers
from influence_kit.viz.captions import score_text
from influence_kit.viz.colours import NEGATIVE, POSITIVE

PANEL, BAR_INCHES, MARGIN = 2.6, 0.3, 1.0
ROOM = 0.5  # for a number at the end of a bar, as a share of the longest


def layer_bars(by_layer: Mapping[str, Values], titles: Sequence[str]) -> Figure:
    """What each layer adds to the score of each pair: a panel a pair, a bar a layer.

    The scales of the panels differ, since scores of different test examples do.

    Args:
        by_layer: ``{layer: its part of the score of each pair}``, ``[p]`` each: entries of what
            ``influence_by_layer`` returned.
        titles: what to write above each panel, ``[p]``; may have several lines.

    Raises:
        InvalidArgumentError: for no layer, or other numbers of titles and scores.
    """
    by_layer = check_mapping(by_layer, "by_layer", "{layer: scores of the pairs [p]}")
    titles = check_texts(titles, "titles", "one title per pair")
    parts = [numbers(values, f"the scores of '{name}'", "[p]") for name, values in by_layer.items()]
    lengths = {name: len(part) for name, part in zip(by_layer, parts, strict=True)}
    if set(lengths.values()) != {len(titles)}:
        raise InvalidArgumentError(
            f"got {len(titles)} titles and scores of {lengths} pairs; there must be as many of each"
        )
    places = range(len(parts))
    size = (1.2 + PANEL * len(titles), BAR_INCHES * len(parts) + MARGIN)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(ncols=len(titles), sharey=True, squeeze=False)[0]
    for pair, (axes, title) in enumerate(zip(panels, titles, strict=True)):
        values = [float(part[pair]) for part in parts]
        colours = [POSITIVE if value >= 0 else NEGATIVE for value in values]
        bars = axes.barh(places, values, 0.65, color=colours)
        axes.bar_label(bars, [score_text(value) for value in values], padding=3, fontsize=8)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_xlim(*_with_room(values))
        axes.tick_params(length=0)
        axes.set_title(f"{title}\nsum {score_text(sum(values))}", fontsize=9)
        axes.set_xticks([])
        axes.set_yticks(places, list(by_layer))
    panels[0].set_ylim(len(parts) - 0.5, -0.5)
    return figure


def _with_room(values: Sequence[float]) -> tuple[float, float]:
    """The limits of bars, with room for the numbers at their ends."""
    low, high = min(*values, 0.0), max(*values, 0.0)
    room = ROOM * (high - low or 1.0)
    return low - room * any(value < 0 for value in values), high + room * any(
        value >= 0 for value in values
    )
