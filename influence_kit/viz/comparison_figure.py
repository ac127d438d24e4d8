"""A figure of methods side by side: how far they agree, and their LDS."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from influence_kit.core.arguments import shown
from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation import Comparison, RowCorrelation
from influence_kit.viz.colours import BLUE, GREY
from influence_kit.viz.matrix import draw_matrix

# inches per method, and beside its row
CELL, MARGIN = 0.62, 2.2


def comparison(result: Comparison) -> Figure:
    """The agreement of the methods as a matrix, and their LDS, where known, as bars.

    A cell is the mean rank correlation between the scores of two methods. A bar is the linear
    datamodeling score, with its standard error; the dashed line is the noise ceiling.

    Args:
        result: what ``evaluation.compare`` returned.

    Raises:
        InvalidArgumentError: for anything else.
    """
    if not isinstance(result, Comparison):
        raise InvalidArgumentError(
            f"`result` must be what `evaluation.compare` returned; got {shown(result)}"
        )
    count, scores = len(result.names), result.scores
    wide = CELL * count + MARGIN
    figure = Figure(
        figsize=(wide if scores is None else wide + 3.4, CELL * count + MARGIN),
        layout="constrained",
    )
    if scores is None:
        _draw_matrix(figure.subplots(), result)
        return figure
    matrix, bars = figure.subplots(ncols=2, width_ratios=[wide, 3.4])
    _draw_matrix(matrix, result)
    _draw_scores(bars, scores)
    return figure


def _draw_matrix(axes: Axes, result: Comparison) -> None:
    names = result.names
    draw_matrix(axes, result.agreement.numpy(), 1.0, names, names, lambda value: f"{value:.2f}")
    axes.set_title("rank correlation of the scores", fontsize=10)


def _draw_scores(axes: Axes, scores: tuple[RowCorrelation, ...]) -> None:
    rows = range(len(scores))
    errors = [score.standard_error or 0.0 for score in scores]
    axes.barh(rows, [score.mean for score in scores], 0.6, xerr=errors, color=BLUE)
    # in the order of the matrix, which has the first row at the top
    axes.set_ylim(len(scores) - 0.5, -0.5)
    axes.set_yticks([])
    axes.axvline(0, color="black", linewidth=0.8)
    title, ceiling = "linear datamodeling score", scores[0].ceiling
    if ceiling is not None:
        axes.axvline(ceiling, color=GREY, linestyle="--")
        title += f"\n(dashed: noise ceiling {ceiling:.2f})"
    axes.set_xlabel("LDS, with its standard error")
    axes.set_title(title, fontsize=10)
    axes.grid(axis="x", alpha=0.3)
