"""Leave-one-out: what training without one example changes, and how well scores predict it.

Letters: m test and n training examples, k of them left out in turn, d features.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation.arrays import Values, numbers, places
from influence_kit.evaluation.correlation import (
    RowCorrelation,
    check_truth,
    is_constant,
    pearson,
    spearman,
)
from influence_kit.evaluation.datamodel import Kind, sign_of
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


class RidgeLeaveOneOut(NamedTuple):
    """Predictions of ridge regression.

    Attributes:
        predictions: of each test example, trained on all examples, ``[m]``.
        without: of each test example, trained without each training example, ``[m, n]``.
    """

    predictions: Tensor
    without: Tensor

    def loss_differences(self, test_targets: Values) -> Tensor:
        """How much the squared error (f - y)^2 rises without each example, ``[m, n]``.

        Positive: the example is a proponent.
        """
        targets = numbers(test_targets, "test_targets", "[m]")
        if len(targets) != len(self.predictions):
            raise InvalidArgumentError(
                f"got {len(targets)} test targets for {len(self.predictions)} test examples"
            )
        before = (self.predictions - targets).square()
        return (self.without - targets[:, None]).square() - before[:, None]


def leave_one_out(
    train: TrainFunction | Retraining,
    n: int,
    measure: Measure,
    outputs_are: Kind,
    indices: Values | None = None,
    seeds: Sequence[int] = (0,),
) -> Tensor:
    """How much worse each output is without each example, by real retraining: ``[m, k]``.

    Positive: the example is a proponent (without it the loss is higher, or the margin lower). The
    mean over seeds, each of which trains k + 1 models. A single example changes little: unless
    training finds the one optimum of a convex loss, the seeds' noise is larger than what is
    measured.

    Args:
        train: ``train_fn(indices, seed) -> model``, or a ``Retraining``.
        n: the number of training examples.
        measure: ``measure(model) -> [m]``: losses or margins of the test examples.
        outputs_are: "loss" or "margin" (higher is better): what is measured.
        indices: which examples to leave out in turn, ``[k]``; None for all.
        seeds: of the trainings.

    Raises:
        InvalidArgumentError: for places outside the training set, or fewer than two examples;
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
    if n < 2:
        raise InvalidArgumentError(f"`n` is {n}; leaving one out needs at least two examples")
    left_out = places(indices, n)
    masks = torch.ones(1 + len(left_out), n, dtype=torch.bool)
    masks[torch.arange(1, len(masks)), left_out] = False
    outputs = as_retraining(train).outputs(masks, measure, seeds).mean(dim=1)
    return sign * (outputs[:1] - outputs[1:]).T


def ridge_leave_one_out(
    inputs: Values, targets: Values, test_inputs: Values, ridge: float, bias: bool = True
) -> RidgeLeaveOneOut:
    r"""Predictions of ridge regression without each training example, in closed form.

    .. math::
        f_{-i}(x) = f(x) - \frac{x^T A^{-1} x_i \, (y_i - f(x_i))}{1 - x_i^T A^{-1} x_i},
        \qquad A = \sum_j x_j x_j^T + \text{ridge} \cdot I

    What minimising sum_j (f(x_j) - y_j)^2 + ridge norm(w)^2 without example i gives, by the formula
    of Sherman and Morrison; the ridge stays the same. In float64.

    Args:
        inputs: the training inputs ``[n, d]``.
        targets: the training targets ``[n]``.
        test_inputs: the test inputs ``[m, d]``.
        ridge: not negative.
        bias: whether the model has one, which the ridge leaves alone.

    Raises:
        InvalidArgumentError: for shapes that do not fit, or where the model is not determined with
            or without an example.

    Example:
        >>> x, y = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([0.0, 1.0, 5.0])
        >>> ridge_leave_one_out(x, y, torch.tensor([[4.0]]), ridge=0.0).without
        tensor([[13.0000, 10.0000,  4.0000]], dtype=torch.float64)
    """
    x, tests = numbers(inputs, "inputs", "[n, d]"), numbers(test_inputs, "test_inputs", "[m, d]")
    y = numbers(targets, "targets", "[n]")
    if len(y) != len(x) or tests.shape[1] != x.shape[1]:
        raise InvalidArgumentError(
            f"`inputs` has shape {list(x.shape)}, `targets` {list(y.shape)} and `test_inputs` "
            f"{list(tests.shape)}; expected [n, d], [n] and [m, d]"
        )
    if ridge < 0:
        raise InvalidArgumentError(f"`ridge` is {ridge}; it must not be negative")
    penalty = torch.full((x.shape[1],), float(ridge), dtype=torch.float64)
    if bias:
        # a constant feature, without a penalty
        x, tests = (pad(side, (0, 1), value=1.0) for side in (x, tests))
        penalty = pad(penalty, (0, 1))
    factor, failed = torch.linalg.cholesky_ex(x.T @ x + penalty.diag())
    if failed:
        raise InvalidArgumentError(
            f"{len(x)} examples of {x.shape[1]} features determine no model with ridge={ridge}; "
            "give a positive ridge"
        )
    solved = torch.cholesky_solve(x.T, factor)
    leverage = (x.T * solved).sum(dim=0)
    undetermined = torch.nonzero(leverage > 1 - 1e-10).flatten()
    if len(undetermined):
        raise InvalidArgumentError(
            f"without example {int(undetermined[0])} the other {len(x) - 1} determine no model; "
            "give a positive (larger) ridge"
        )
    theta = solved @ y
    shift = tests @ solved * ((y - x @ theta) / (1 - leverage))
    predictions = tests @ theta
    return RidgeLeaveOneOut(predictions, predictions[:, None] - shift)


def loo_correlation(scores: Values, differences: Values) -> LeaveOneOutCorrelation:
    """How well scores predict leave-one-out differences: correlations over training examples.

    Args:
        scores: ``[m, k]``, positive is a proponent; of the examples left out:
            ``scores[:, indices]``.
        differences: what ``leave_one_out`` returned, ``[m, k]``, positive is a proponent.

    Raises:
        InvalidArgumentError: for shapes that differ, values that are not finite, or a test example
            whose differences are all the same.

    Example:
        >>> loo_correlation([[3.0, 1.0, 2.0]], [[0.3, 0.1, 0.9]]).spearman.per_test
        tensor([0.5000], dtype=torch.float64)
    """
    predicted = numbers(scores, "scores", "[m, k]")
    real = numbers(differences, "differences", "[m, k]")
    if predicted.shape != real.shape:
        raise InvalidArgumentError(
            f"`scores` has shape {list(predicted.shape)} and `differences` {list(real.shape)}; "
            "both must be [m, k], of the same training examples"
        )
    check_truth(real, "differences")
    constant = int(is_constant(predicted).sum())
    return LeaveOneOutCorrelation(
        RowCorrelation(pearson(predicted, real), constant),
        RowCorrelation(spearman(predicted, real), constant),
    )
