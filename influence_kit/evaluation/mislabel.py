"""How well scores find wrong labels, if examples are inspected by descending score.

Shapes: n examples, of which w have a wrong label.
"""

import torch
from torch import Tensor

from influence_kit.core.arguments import check_number
from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation.arrays import Values, count_of, marks, numbers


def mislabel_auc(scores: Values, is_wrong: Values) -> float:
    """P(a wrong label's score > a right label's score) + P(they are equal) / 2, between 0 and 1.

    The area under the ROC curve, as ``sklearn.metrics.roc_auc_score`` gives it: random scores reach
    0.5; 1 means that every wrong label comes before every right one.

    Args:
        scores: how suspicious each example is, ``[n]``, in any unit: only the order matters.
        is_wrong: whether its label is wrong, ``[n]`` of booleans, or of 0 and 1.

    Raises:
        InvalidArgumentError: for other shapes, scores that are not finite, or where all labels are
            right or all are wrong.

    Example:
        >>> mislabel_auc([0.9, 0.1, 0.5, 0.5], [True, False, True, False])
        0.875
    """
    values, wrong = _checked(scores, is_wrong)
    _, group, sizes = torch.unique(values, return_inverse=True, return_counts=True)
    # tied examples share the mean of their ranks
    last_rank = sizes.cumsum(0).double()
    rank = (last_rank - (sizes - 1) / 2)[group]
    w = int(wrong.sum())
    pairs_won = rank[wrong].sum() - w * (w + 1) / 2
    return float(pairs_won / (w * (len(values) - w)))


def recall_at(scores: Values, is_wrong: Values, fraction: float) -> float:
    """The share of the w wrong labels among the first ``fraction`` of the examples inspected.

    Examples are inspected by descending score, ties by index. Their number is ``fraction * n``,
    rounded to a whole number (halves up).

    Args:
        scores: how suspicious each example is, ``[n]``.
        is_wrong: whether its label is wrong, ``[n]``.
        fraction: the share of the examples inspected, above 0 and at most 1.

    Raises:
        InvalidArgumentError: as ``mislabel_auc``, and for a fraction outside (0, 1].

    Example:
        >>> recall_at([0.9, 0.1, 0.5, 0.4], [True, False, False, True], fraction=0.5)
        0.5
    """
    _, found, w = _counts(scores, is_wrong, fraction)
    return found / w


def precision_at(scores: Values, is_wrong: Values, fraction: float) -> float:
    """The share of wrong labels among the first ``fraction`` of the examples inspected.

    Examples are inspected as for ``recall_at``; at least one must be.

    Args:
        scores: how suspicious each example is, ``[n]``.
        is_wrong: whether its label is wrong, ``[n]``.
        fraction: the share of the examples inspected, above 0 and at most 1.

    Raises:
        InvalidArgumentError: as ``recall_at``, and for a fraction of less than one example.

    Example:
        >>> precision_at([0.9, 0.1, 0.5, 0.4], [True, False, False, True], fraction=0.75)
        0.6666666666666666
    """
    inspected, found, _ = _counts(scores, is_wrong, fraction)
    if inspected == 0:
        raise InvalidArgumentError(
            f"a share of {fraction} of {len(scores)} examples is less than one; at least one must "
            "be inspected"
        )
    return found / inspected


def detection_curve(scores: Values, is_wrong: Values) -> tuple[Tensor, Tensor]:
    """The share of wrong labels found (second) against the share of examples inspected (first).

    Examples are inspected by descending score, ties by index.

    Args:
        scores: how suspicious each example is, ``[n]``.
        is_wrong: whether its label is wrong, ``[n]``.

    Returns:
        Two float64 tensors ``[n + 1]``, each from 0 to 1; entry i is after i examples.

    Raises:
        InvalidArgumentError: as ``mislabel_auc``.

    Example:
        >>> detection_curve([0.9, 0.1, 0.5, 0.4], [True, False, False, True])[1].tolist()
        [0.0, 0.5, 0.5, 1.0, 1.0]
    """
    values, wrong = _checked(scores, is_wrong)
    start = torch.zeros(1, dtype=torch.float64)
    found = torch.cat([start, wrong[_order(values)].double().cumsum(0)]) / wrong.sum()
    inspected = torch.arange(len(values) + 1, dtype=torch.float64) / len(values)
    return inspected, found


def _order(values: Tensor) -> Tensor:
    """The order of inspection: by descending score, ties by index."""
    return torch.argsort(values, descending=True, stable=True)


def _counts(scores: Values, is_wrong: Values, fraction: float) -> tuple[int, int, int]:
    """How many examples are inspected, how many wrong labels are found, and how many there are."""
    check_number(fraction, "fraction", above=0, most=1)
    values, wrong = _checked(scores, is_wrong)
    inspected = count_of(fraction, len(values))
    return inspected, int(wrong[_order(values)[:inspected]].sum()), int(wrong.sum())


def _checked(scores: Values, is_wrong: Values) -> tuple[Tensor, Tensor]:
    """Scores as float64 ``[n]`` and marks as bool ``[n]``, on the CPU."""
    values = numbers(scores, "scores", "[n]")
    wrong = marks(is_wrong, "is_wrong", "[n]", "True where the label is wrong")
    if len(wrong) != len(values):
        raise InvalidArgumentError(
            f"got {len(values)} `scores` and {len(wrong)} of `is_wrong`; there must be one of each "
            "per example"
        )
    if not 0 < int(wrong.sum()) < len(wrong):
        raise InvalidArgumentError(
            f"`is_wrong` marks {int(wrong.sum())} of {len(wrong)} labels as wrong; there must be "
            "at least one wrong and one right label"
        )
    return values, wrong
