"""Leave-one-out of ridge regression in closed form.

Shapes: m test examples, n training examples, d features.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from influence_kit.core.arguments import check_flag, check_number
from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation.arrays import Values, numbers


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


def ridge_leave_one_out(
    inputs: Values, targets: Values, test_inputs: Values, ridge: float, bias: bool = True
) -> RidgeLeaveOneOut:
    r"""Predictions of ridge regression without each training example, in closed form.

    .. math::
        f_{-i}(x) = f(x) - \frac{x^T A^{-1} x_i \, (y_i - f(x_i))}{1 - x_i^T A^{-1} x_i},
        \qquad A = \sum_j x_j x_j^T + \text{ridge} \cdot I

    The minimizer of sum_j (f(x_j) - y_j)^2 + ridge norm(w)^2 without example i, by the
    Sherman-Morrison formula, with the same ridge. In float64.

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
    x, y, tests = _examples(inputs, targets, test_inputs)
    check_flag(bias, "bias")
    check_number(ridge, "ridge", least=0)
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


def _examples(
    inputs: Values, targets: Values, test_inputs: Values
) -> tuple[Tensor, Tensor, Tensor]:
    x, tests = numbers(inputs, "inputs", "[n, d]"), numbers(test_inputs, "test_inputs", "[m, d]")
    y = numbers(targets, "targets", "[n]")
    if len(y) != len(x) or tests.shape[1] != x.shape[1]:
        raise InvalidArgumentError(
            f"`inputs` has shape {list(x.shape)}, `targets` {list(y.shape)} and `test_inputs` "
            f"{list(tests.shape)}; expected [n, d], [n] and [m, d]"
        )
    return x, y, tests
