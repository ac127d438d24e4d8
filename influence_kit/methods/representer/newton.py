"""Newton's method for the weights of one linear layer, in float64, to convergence.

Shapes: n examples, r rows of features (one per example or position), d features, c outputs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from influence_kit.errors import CurvatureError, NonFiniteError
from influence_kit.methods.representer.last_layer import slopes_of
from influence_kit.operators.operator import Operator
from influence_kit.operators.solvers import conjugate_gradients

EPS = torch.finfo(torch.float64).eps
# the largest number of products with the Hessian per step; a step is then inexact
MOST_PRODUCTS = 10_000
# a step must gain this share of the decrease that its slope predicts; it is shortened at most so
# often
GAIN, MOST_TRIALS = 1e-4, 40
# steps in a row that do not reduce the gradient: rounding, or a loss without a minimum
PATIENCE = 10


@dataclass(frozen=True)
class Objective:
    """(1 / n) * sum of losses(features @ weights^T) + l2 * ||weights||^2.

    Args:
        features: ``[r, d]``, float64.
        losses: returns the sum of the examples' losses, given their outputs ``[r, c]``; convex and
            twice differentiable.
        n: the number of examples.
        l2: the weight of the penalty, positive.
    """

    features: Tensor
    losses: Callable[[Tensor], Tensor]
    n: int
    l2: float

    def value(self, total: Tensor, weights: Tensor) -> float:
        """The objective, given the sum of the losses at these weights."""
        return float(total.detach()) / self.n + self.l2 * float(weights.square().sum())

    def gradient(self, slopes: Tensor, weights: Tensor) -> Tensor:
        """The gradient ``[c, d]``, given those of the losses in the outputs ``[r, c]``."""
        return slopes.T @ self.features / self.n + 2 * self.l2 * weights


class Point(Operator):
    """An objective at some weights; as an operator, the Hessian of its mean loss there.

    Args:
        objective: the objective.
        weights: ``[c, d]``.
    """

    def __init__(self, objective: Objective, weights: Tensor) -> None:
        super().__init__([weights.numel()], weights)
        self.objective, self.weights = objective, weights
        self.outputs = (objective.features @ weights.T).requires_grad_()
        with torch.enable_grad():
            total = objective.losses(self.outputs)
            self.slopes = slopes_of(total, self.outputs, differentiable=True)
        self.value = objective.value(total, weights)
        self.gradient = objective.gradient(self.slopes.detach(), weights)
        if not math.isfinite(self.value) or not bool(torch.isfinite(self.gradient).all()):
            raise NonFiniteError(
                "the loss of the training examples, or its gradient, is NaN or infinite while the "
                "last layer is refitted; `TracInCP(...).self_influence()` names such an example"
            )

    def product(self, vectors: Tensor) -> Tensor:
        return torch.stack([self._product(v.view_as(self.weights)).flatten() for v in vectors])

    def _product(self, direction: Tensor) -> Tensor:
        features = self.objective.features
        bent = torch.zeros_like(self.outputs)
        if self.slopes.requires_grad:
            (bent,) = torch.autograd.grad(
                self.slopes,
                self.outputs,
                features @ direction.T,
                retain_graph=True,
                materialize_grads=True,
            )
        return bent.T @ features / self.objective.n

    @property
    def error(self) -> float:
        """The norm of the gradient."""
        return float(self.gradient.norm())

    @property
    def scale(self) -> float:
        """The norm of the penalty's gradient: at the minimum, also that of the mean loss."""
        return 2 * self.objective.l2 * float(self.weights.norm())

    def rounding(self) -> float:
        """A lower bound of the rounding error of the gradient: a sum of terms that cancel."""
        norms = self.slopes.detach().norm(dim=1) * self.objective.features.norm(dim=1)
        return 4 * EPS * float(norms.sum()) / self.objective.n

    def step(self, tol: float) -> Tensor:
        """Newton's step ``[c, d]``, its equation solved to the relative error ``tol``."""
        right = -self.gradient.flatten()[None]
        penalty = 2 * self.objective.l2
        try:
            step = conjugate_gradients(self, right, penalty, max_iter=MOST_PRODUCTS, tol=tol)
        except CurvatureError as error:
            raise CurvatureError(
                f"the last layer cannot be refitted with l2={self.objective.l2:g}: the objective "
                "is not convex, because the loss is not convex in the layer's outputs; use "
                "another `loss_fn`, or raise `l2`"
            ) from error
        return step.view_as(self.weights)

    def moved(self, step: Tensor) -> Tensor | None:
        """The weights after the largest part of a step that lowers the objective; None if none."""
        along = self.objective.features @ step.T
        slope = float((self.gradient * step).sum())
        length = 1.0
        for _ in range(MOST_TRIALS):
            weights = self.weights + length * step
            outputs = (self.outputs.detach() + length * along).requires_grad_()
            with torch.enable_grad():
                total = self.objective.losses(outputs)
                slopes = slopes_of(total, outputs)
            value = self.objective.value(total, weights)
            there = float((slopes * along).sum()) / self.objective.n
            there += 2 * self.objective.l2 * float((weights * step).sum())
            if self._is_gain(value, length * slope, there / abs(slope)):
                return weights
            # the point at which the slope would vanish if it were linear
            share = slope / (slope - there) if math.isfinite(there) else 0.1
            length *= min(max(share, 0.1), 0.5)
        return None

    def _is_gain(self, value: float, promised: float, slope: float) -> bool:
        if value <= self.value + GAIN * promised:
            return True
        # near the minimum, the decrease of the value is lost in rounding and the slope decides
        # (Hager and Zhang 2005)
        level = value <= self.value + 1e-12 * abs(self.value)
        return level and slope <= 1 - 2 * GAIN


def minimum(objective: Objective, outputs: int, tol: float, max_iter: int) -> Tensor:
    """The weights ``[c, d]`` that minimise an objective.

    Done if the norm of the gradient is at most ``tol`` times that of the penalty's gradient, or its
    rounding error.

    Args:
        objective: what to minimise.
        outputs: the number c of outputs.
        tol: relative norm of the gradient.
        max_iter: the largest number of Newton steps.

    Raises:
        CurvatureError: if that is not reached.
    """
    features = objective.features
    point = Point(objective, features.new_zeros(outputs, features.shape[1]))
    errors: list[float] = []
    for taken in range(max_iter + 1):
        errors.append(point.error)
        enough = max(tol * point.scale, point.rounding())
        if point.error <= enough:
            return point.weights
        # steps are solved more accurately near the end, and never more accurately than needed
        share = min(0.25, (point.error / errors[0]) ** 0.5)
        solved = max(share, 0.1 * enough / point.error)
        goes_on = taken < max_iter and taken - errors.index(min(errors)) < PATIENCE
        weights = point.moved(point.step(solved)) if goes_on else None
        if weights is None:
            break
        point = Point(objective, weights)
    relative = point.error / point.scale if point.scale else math.inf
    raise CurvatureError(
        f"the last layer is not refitted after {taken} Newton steps: the norm of the gradient is "
        f"{point.error:.3g}, {relative:.3g} times that of the penalty's (tol={tol:g}). Raise "
        "`l2`, `max_iter` or `tol`; the refit does not converge for a loss that is not convex and "
        "twice differentiable in the outputs, or computes in float32"
    )
