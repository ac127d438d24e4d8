"""Texts that helped and hurt predictions.

Shapes: m test texts, n training texts, k of them per test text.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, zip_longest
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from influence_kit.core.arguments import check_count, check_sequence, check_texts
from influence_kit.errors import InvalidArgumentError
from influence_kit.scoring.reducers import KMostInfluentialResults
from influence_kit.viz.captions import Heads, heads_of, label_text, plain_text, score_text
from influence_kit.viz.colours import NEGATIVE, NEUTRAL, POSITIVE
from influence_kit.viz.top_results import checked_heads, checked_results

# characters per column, in a monospaced font
LETTERS, FONT, LETTER_INCHES, LINE_INCHES = 58, 8, 0.072, 0.155
MARGIN, GAP = 0.15, 0.3  # inches
ELLIPSIS = " ..."


class _Line(NamedTuple):
    """A line of text and its style."""

    text: str
    colour: str = NEUTRAL
    bold: bool = False


# the lines beside each other, one per column
_Row = Sequence[_Line | None]


@dataclass(frozen=True)
class _Source:
    """The training texts, and how many lines of each are shown."""

    texts: Sequence[str]
    labels: Sequence[Any] | Tensor | None
    lines: int

    def entries(self, results: KMostInfluentialResults, row: int) -> list[list[_Line]]:
        """The lines for the training texts in a row of the results."""
        scores = results.influence_scores[row].tolist()
        return list(map(self._entry, results.indices[row].tolist(), scores))

    def _entry(self, index: int, score: float) -> list[_Line]:
        """The index of a training text, its score and its label, then the text."""
        label = "" if self.labels is None else f" | {label_text(self.labels[index])}"
        colour = POSITIVE if score > 0 else NEGATIVE if score < 0 else NEUTRAL
        head = _wrapped(f"#{index} | {score_text(score)}{label}", LETTERS, lines=1)
        excerpt = _wrapped(self.texts[index], LETTERS, self.lines)
        return [_Line(head[0], colour, bold=True), *map(_Line, excerpt)]


def influential_texts(
    queries: Sequence[str],
    proponents: KMostInfluentialResults,
    opponents: KMostInfluentialResults,
    train_texts: Sequence[str],
    train_labels: Sequence[Any] | Tensor | None = None,
    lines: int = 3,
    heads: Heads | None = None,
    method: object = None,
) -> Figure:
    """The beginning of each test text, and below it those of its k proponents and k opponents.

    Proponents are on the left, opponents on the right, best first, each below its index in the
    training set, its score and its label.

    Args:
        queries: the test texts ``[m]``, or other descriptions of the test examples.
        proponents: what ``influence(..., k=k)`` returned for them.
        opponents: what ``influence(..., k=k, proponents=False)`` returned.
        train_texts: the training texts ``[n]``, or other descriptions of the training examples.
        train_labels: their labels ``[n]``, shown by ``str``, if there are any.
        lines: how many lines of a text to show at most; white space is collapsed.
        heads: what to write above proponents and opponents; None for what ``method`` explains.
        method: the method that gave the scores. With a ``test_output_fn``, proponents raised the
            output; without one, or where None, they lowered the loss.

    Raises:
        InvalidArgumentError: if the numbers of texts and results differ, or ``lines`` is not
            positive.
    """
    heads = checked_heads(heads)
    queries = check_texts(queries, "queries", "one text per test example")
    train_texts = check_texts(train_texts, "train_texts", "one text per training example")
    n = len(train_texts)
    if train_labels is not None:
        check_sequence(train_labels, "train_labels", "labels, one per training text", n)
    check_count(lines, "lines", least=0)
    proponents = checked_results(proponents, "proponents", n)
    opponents = checked_results(opponents, "opponents", n)
    counts = len(proponents.indices), len(opponents.indices)
    if len(queries) == 0 or set(counts) != {len(queries)} or lines < 1:
        raise InvalidArgumentError(
            f"got {len(queries)} test texts, results of {counts[0]} (proponents) and {counts[1]} "
            f"(opponents), and lines={lines}; there must be at least one test text and line, and "
            "one row of each result per test text"
        )
    source, written = _Source(train_texts, train_labels, lines), heads_of(heads, method)
    rows: list[_Row] = []
    for row, query in enumerate(queries):
        rows += [[_Line(line, bold=True)] for line in _wrapped(query, 2 * LETTERS, lines)]
        rows += [[], [_Line(head, bold=True) for head in written]]
        sides = [source.entries(results, row) for results in (proponents, opponents)]
        for beside in zip_longest(*sides, fillvalue=[]):
            rows += [*zip_longest(*beside), []]
        rows += [[], []]
    return _drawn(rows[:-3])


def _wrapped(text: str, width: int, lines: int) -> list[str]:
    """The beginning of a text, its white space collapsed."""
    wrapped = textwrap.wrap(" ".join(plain_text(text).split()), width)
    shown = wrapped[:lines]
    if len(shown) < len(wrapped):
        # not textwrap's `max_lines`, which drops a long word altogether
        shown[-1] = shown[-1][: width - len(ELLIPSIS)] + ELLIPSIS
    return shown or ["(empty)"]


def _drawn(rows: Sequence[_Row]) -> Figure:
    """The rows from top to bottom; an empty one is half as high."""
    width = 2 * (LETTERS * LETTER_INCHES + MARGIN) + GAP
    heights = [LINE_INCHES if row else LINE_INCHES / 2 for row in rows]
    height = sum(heights) + 2 * MARGIN
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))  # a notebook does not show a figure without any
    axes.set_axis_off()
    tops = accumulate(heights, initial=MARGIN)
    for top, row in zip(tops, rows, strict=False):
        for line, left in zip(row, (MARGIN, MARGIN + LETTERS * LETTER_INCHES + GAP), strict=False):
            if line is not None:
                _write(axes, line, left / width, 1 - top / height)
    return figure


def _write(axes: Axes, line: _Line, x: float, y: float) -> None:
    axes.text(
        x,
        y,
        line.text,
        color=line.colour,
        weight="bold" if line.bold else "normal",
        family="monospace",
        fontsize=FONT,
        verticalalignment="top",
        parse_math=False,  # a dollar sign is not the beginning of a formula
    )
