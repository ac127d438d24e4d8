"""The linear datamodeling score: Park et al. 2023, arXiv 2303.14186, section 4.

Shapes: m test examples, n training examples, S subsets of the training set, R repeats (seeds).
"""

from typing import Literal

import torch
from torch import Tensor

from influence_kit.core.arguments import check_count, check_flag, check_seed, shown
from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation.arrays import (
    Values,
    count_of,
    numbers,
    repeated_numbers,
    subset_weights,
)
from influence_kit.evaluation.correlation import RowCorrelation, row_correlations, spearman

Kind = Literal["margin", "loss"]
# a proponent raises a margin and lowers a loss
SIGNS = {"margin": 1.0, "loss": -1.0}
# relative rounding error of a float64 number
ROUNDING = torch.finfo(torch.float64).eps
MOST = 2**31 - 1  # examples, or subsets


def half_subsets(n: int, count: int, fraction: float = 0.5, seed: int = 0) -> Tensor:
    """Random subsets of n examples, all of the same size, as masks: bool ``[count, n]``.

    Args:
        n: the number of examples.
        count: how many subsets.
        fraction: the share of the examples in each subset, rounded to whole examples (halves up).
        seed: of the random draw.

    Raises:
        InvalidArgumentError: for no subsets, or a size that is not between 1 and n - 1.

    Example:
        >>> half_subsets(6, count=4).sum(dim=1).tolist()
        [3, 3, 3, 3]
    """
    check_count(count, "count", least=0, most=MOST)
    size = count_of(fraction, check_count(n, "n", most=MOST))
    if count < 1 or not 0 < size < n:
        raise InvalidArgumentError(
            f"got {count} subsets with a share of {fraction} of {n} examples, {size} each; there "
            f"must be at least one subset, and 1 to {n - 1} examples in each"
        )
    generator = torch.Generator().manual_seed(check_seed(seed))
    masks = torch.zeros(count, n, dtype=torch.bool)
    for mask in masks:
        mask[torch.randperm(n, generator=generator)[:size]] = True
    return masks


def linear_datamodeling_score(
    scores: Values,
    subsets: Values,
    outputs: Values,
    outputs_are: Kind,
    leave_out_constant: bool = False,
) -> RowCorrelation:
    r"""LDS = mean over test examples of Spearman(sum of the scores of a subset, its output).

    .. math::
        \frac{1}{m} \sum_t \rho_s \Bigl( \sum_{i \in S_s} \tau_{ti},\;
        \pm \frac{1}{R} \sum_r f_t(\theta_{sr}) \Bigr)

    How well the sums of scores over subsets predict the output f_t of the models trained on these
    subsets, averaged over repeats (arXiv 2303.14186). From -1 to 1; random scores reach 0 on
    average.

    Retraining is noisy: even perfect scores do not reach 1. The noise ceiling is estimated from the
    rank correlation between the means of two halves of the repeats (averaged over random splits),
    extended to all repeats by the Spearman-Brown formula; its square root is the correlation with
    the means over infinitely many repeats. It is 0 where the halves do not agree at all.

    Args:
        scores: what ``influence`` returned, ``[m, n]``; positive is a proponent.
        subsets: which training examples each subset has, bool ``[S, n]``. Or the weight of each
            training example in each training, floating-point ``[S, n]``: the prediction is then
            the sum of weight times score.
        outputs: what was measured of each test example in the models trained on the subsets,
            ``[S, m]``, or ``[S, R, m]`` as ``Retraining.outputs`` returns it.
        outputs_are: "margin" where higher is better (a margin, a log-likelihood), "loss" where
            lower is better.
        leave_out_constant: leave out the test examples whose outputs, or whose predictions, are the
            same for all subsets. By default, constant outputs are an error, and constant
            predictions count as 0.

    Raises:
        InvalidArgumentError: for shapes that do not fit each other, values that are not finite, or
            a test example whose outputs are the same for all subsets.

    Example:
        >>> scores = torch.tensor([[3.0, 1.0, -2.0, 0.5]])
        >>> subsets = half_subsets(4, count=6)
        >>> outputs = subsets.double() @ scores.double().T  # as a linear datamodel has them
        >>> round(linear_datamodeling_score(scores, subsets, outputs, "margin").mean, 6)
        1.0
    """
    check_flag(leave_out_constant, "leave_out_constant")
    tau = numbers(scores, "scores", "[m, n]")
    (m, n), weights = tau.shape, subset_weights(subsets, tau.shape[1])
    repeats = repeated_numbers(outputs, "outputs", "[S, R, m]")
    if repeats.shape[0] != len(weights) or repeats.shape[2] != m:
        raise InvalidArgumentError(
            f"`outputs` has {repeats.shape[0]} subsets and {repeats.shape[2]} test examples; there "
            f"are {len(weights)} subsets, and scores of {m} test examples"
        )
    truth = sign_of(outputs_are) * repeats.permute(1, 2, 0)
    predicted = tau @ weights.T
    (found,) = row_correlations(
        predicted, truth, "outputs", leave_out_constant, [spearman], noise=n * ROUNDING
    )
    return found


def sign_of(outputs_are: str) -> float:
    """1 where a proponent raises the output, -1 where it lowers it."""
    if not isinstance(outputs_are, str) or outputs_are not in SIGNS:
        raise InvalidArgumentError(
            f'`outputs_are` is {shown(outputs_are)}; it must be "margin" (higher is better) or '
            '"loss" (lower is better)'
        )
    return SIGNS[outputs_are]
