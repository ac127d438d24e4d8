"""Matrices of signed numbers. Shapes: r rows, c columns."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from influence_kit.core.arguments import check_text, check_texts
from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation.arrays import Values, numbers
from influence_kit.viz.colours import SIGNED

# inches of a cell, beside the cells and above them
WIDE, HIGH, LEFT, TOP = 0.62, 0.3, 2.4, 0.9
MOST_DECIMALS = 4  # that fit into a cell


def feature_matrix(
    values: Values, rows: Sequence[str], columns: Sequence[str], title: str = ""
) -> Figure:
    """Signed numbers as a matrix of colours with their values, such as features of some examples.

    Blue is positive, orange-red negative, white zero; the largest absolute value sets the scale.

    Args:
        values: ``[r, c]``, such as the result of ``perturbation_influence`` for one test example
            and some training examples.
        rows: names of the rows, ``[r]``.
        columns: names of the columns, ``[c]``.
        title: of the figure.

    Raises:
        InvalidArgumentError: if the numbers of names and values differ, or values are not
            finite.
    """
    rows = check_texts(rows, "rows", "one name per row")
    columns = check_texts(columns, "columns", "one name per column")
    check_text(title, "title")
    numbers_ = numbers(values, "values", "[r, c]").numpy()
    if numbers_.shape != (len(rows), len(columns)):
        raise InvalidArgumentError(
            f"`values` has shape {list(numbers_.shape)}; there are {len(rows)} names of rows and "
            f"{len(columns)} of columns"
        )
    size = (LEFT + WIDE * len(columns), TOP + HIGH * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    limit = float(np.abs(numbers_).max()) or 1.0
    # decimals such that the largest number has two digits
    decimals = max(0, 1 - math.floor(math.log10(limit)))
    form = f"+.{decimals}f" if decimals <= MOST_DECIMALS else "+.1e"
    # + 0.0: without negative zeros
    shown = numbers_.round(decimals) + 0.0 if decimals <= MOST_DECIMALS else numbers_
    draw_matrix(axes, shown, limit, rows, columns, lambda value: f"{value:{form}}")
    axes.set_aspect("auto")
    axes.set_title(title, fontsize=10)
    return figure


def draw_matrix(
    axes: Axes,
    values: np.ndarray,
    limit: float,
    rows: Sequence[str],
    columns: Sequence[str],
    written: Callable[[float], str],
) -> None:
    """Draw cells with their numbers, coloured from -limit to limit, and the names beside them."""
    axes.imshow(values, cmap=SIGNED, vmin=-limit, vmax=limit)
    slanted: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(len(columns)), columns, parse_math=False, **slanted)
    axes.set_yticks(range(len(rows)), rows, parse_math=False)
    for (row, column), value in np.ndenumerate(values):
        # the cells of large numbers are dark
        colour = "white" if abs(value) > 0.6 * limit else "black"
        text = written(value)
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=9)
