"""Leave-one-out: what training without one example changes, and how well scores predict it.

Shapes: m test examples, n training examples, k of them left out in turn, R repeats (seeds).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from influence_kit.core.arguments import check_count, check_flag
from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation.arrays import Values, indices_in, numbers, repeated_numbers
from influence_kit.evaluation.correlation import (
    RowCorrelation,
    pearson,
    row_correlations,
    spearman,
)
from influence_kit.evaluation.datamodel import MOST, Kind, sign_of
from influence_kit.evaluation.recipe import Measure, TrainFunction
from influence_kit.evaluation.retraining import Retraining, as_retraining


class LeaveOneOutCorrelation(NamedTuple):
    """How well scores agree with real leave-one-out differences.

    Attributes:
        pearson: of the values.
        spearman: of their ranks.
    """

    pearson: RowCorrelation
    spearman: RowCorrelation


def leave_one_out(
    train: TrainFunction | Retraining,
    n: int,
    measure: Measure,
    outputs_are: Kind,
    indices: Values | None = None,
    seeds: Sequence[int] = (0,),
    by_seed: bool = False,
) -> Tensor:
    """How much worse each output is without each example, by actual retraining: ``[m, k]``.

    Positive: the example is a proponent (without it the loss is higher, or the margin lower). The
    result is the mean over seeds; each seed trains k + 1 models. A single example changes little:
    unless training reaches the unique optimum of a convex loss, the seed changes more than the
    example does. Two things help: the same randomness with and without an example
    (``BatchedSGD(..., same_batches=True)``), and several seeds. ``loo_correlation`` estimates from
    the differences of each seed how much noise is left; ``differences.std(0) / R ** 0.5`` is the
    standard error of each mean.

    Args:
        train: ``train_fn(indices, seed) -> model``, or a ``Retraining``.
        n: the number of training examples.
        measure: ``measure(model) -> [m]``: losses or margins of the test examples.
        outputs_are: what is measured: "loss" (lower is better) or "margin" (higher is better).
        indices: which examples to leave out in turn, ``[k]``; None for all.
        seeds: of the trainings.
        by_seed: return the differences of each seed, ``[R, m, k]``, not their mean.

    Raises:
        InvalidArgumentError: for indices outside the training set, or fewer than two examples;
            otherwise as ``Retraining.outputs``.

    Example:
        >>> values = torch.tensor([1.0, 2.0, 6.0])
        >>> def train_fn(indices, seed):  # predicts the mean of its training values
        ...     model = torch.nn.Linear(1, 1)
        ...     torch.nn.init.constant_(model.bias, float(values[indices].mean()))
        ...     return model
        >>> def measure(model):
        ...     return (model.bias - 2.0) ** 2
        >>> leave_one_out(train_fn, 3, measure, "loss").tolist()
        [[3.0, 1.25, -0.75]]
    """
    sign = sign_of(outputs_are)
    check_flag(by_seed, "by_seed")
    retraining = as_retraining(train)
    if check_count(n, "n", least=0, most=MOST) < 2:
        raise InvalidArgumentError(f"`n` is {n}; leaving one out needs at least two examples")
    left_out = torch.arange(n) if indices is None else indices_in(indices, n)
    masks = torch.ones(1 + len(left_out), n, dtype=torch.bool)
    masks[torch.arange(1, len(masks)), left_out] = False
    outputs = retraining.outputs(masks, measure, seeds)
    differences = sign * (outputs[:1] - outputs[1:]).permute(1, 2, 0)
    return differences if by_seed else differences.mean(dim=0)


def loo_correlation(
    scores: Values, differences: Values, leave_out_constant: bool = False
) -> LeaveOneOutCorrelation:
    """How well scores predict leave-one-out differences: correlations over training examples.

    With differences by seed, the noise ceiling, which is the correlation of perfect scores with the
    mean over seeds, is estimated as for ``linear_datamodeling_score``.

    Args:
        scores: ``[m, k]`` of the examples left out, ``scores[:, indices]``; positive marks a
            proponent.
        differences: what ``leave_one_out`` returned, ``[m, k]``, or ``[R, m, k]`` by seed; positive
            marks a proponent.
        leave_out_constant: leave out the test examples whose differences, or whose scores, are all
            equal. By default, constant differences are an error, and constant scores count as 0.

    Raises:
        InvalidArgumentError: for shapes that differ, values that are not finite, or a test example
            whose differences are all equal.

    Example:
        >>> loo_correlation([[3.0, 1.0, 2.0]], [[0.3, 0.1, 0.9]]).spearman.per_test
        tensor([0.5000], dtype=torch.float64)
    """
    check_flag(leave_out_constant, "leave_out_constant")
    predicted = numbers(scores, "scores", "[m, k]")
    real = repeated_numbers(differences, "differences", "[R, m, k]")
    if predicted.shape != real.shape[1:]:
        raise InvalidArgumentError(
            f"`scores` has shape {list(predicted.shape)} and `differences` {list(real.shape[1:])}; "
            "both must be [m, k], of the same training examples"
        )
    measures = [pearson, spearman]
    return LeaveOneOutCorrelation(
        *row_correlations(predicted, real, "differences", leave_out_constant, measures)
    )
