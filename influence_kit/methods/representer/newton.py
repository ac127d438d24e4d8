"""Newton's method for the weights of one linear layer, in float64, to convergence.

Shapes: n examples, r rows of features (one an example, or one a position), d features, c outputs.
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
# of the products with the Hessian for one step; what is left then is an inexact step
MOST_PRODUCTS = 10_000
# a step must gain this share of what its slope promises; it is shortened this often at most
GAIN, MOST_TRIALS = 1e-4, 40
# steps in a row that bring the gradient no nearer to zero: rounding, or a loss without a minimum
PATIENCE = 10


@dataclass(frozen=True)
class Objective:
    """(1 / n) * sum of losses(features @ weights^T) + l2 * ||weights||^2.

    Args:
        features: ``[r, d]``, float64.
        losses: the sum of the examples' losses, given their outputs ``[r, c]``; convex and twice
            differentiable.
        n: the number of examples.
        l2: positive.
    """

    features: Tensor
    losses: Callable[[Tensor], Tensor]
    n: int
    l2: float

    def value(self, total: Tensor, weights: Tensor) -> float:
        """The objective, given the sum of the losses at these weights."""
        return float(total.detach()) / self.n + self.l2 * float(weights.square().sum())

    def gradient(self, slopes: Tensor, weights: Tensor) -> Tensor:
        """Its gradient ``[c, d]``, given those of the losses in the outputs ``[r, c]``."""
        return slopes.T @ self.features / self.n + 2 * self.l2 * weights


class Point(Operator):
    """An objective at some weights; as an operator, the Hessian of its mean loss there.

    Args:
        objective: what is minimised.
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
        """The norm of the penalty's gradient: at the minimum, also that of the mean loss's."""
        return 2 * self.objective.l2 * float(self.weights.norm())

    def rounding(self) -> float:
        """What rounding makes of the gradient, at least: it is a sum of terms that cancel."""
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
                "is not convex, which it is where the loss is convex in the layer's outputs; use "
                "another `loss_fn`, or raise `l2`"
            ) from error
        return step.view_as(self.weights)

    def moved(self, step: Tensor) -> Tensor | None:
        """The weights after as much of a step as the objective falls along; None for no part."""
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
            # where the slope would vanish, were it linear
            share = slope / (slope - there) if math.isfinite(there) else 0.1
            length *= min(max(share, 0.1), 0.5)
        return None

    def _is_gain(self, value: float, promised: float, slope: float) -> bool:
        if value <= self.value + GAIN * promised:
            return True
        # near the minimum, the fall of the value is lost in rounding and the slope tells (Hager and
        # Zhang 2005)
        level = value <= self.value + 1e-12 * abs(self.value)
        return level and slope <= 1 - 2 * GAIN


def minimum(objective: Objective, outputs: int, tol: float, max_iter: int) -> Tensor:
    """The weights ``[c, d]`` that minimise an objective.

    Done where the norm of the gradient is at most ``tol`` times that of its penalty's part, or what
    rounding makes of it.

    Args:
        objective: what to minimise.
        outputs: c.
        tol: relative norm of the gradient.
        max_iter: the most Newton steps.

    Raises:
        CurvatureError: where that is not reached.
    """
    features = objective.features
    point = Point(objective, features.new_zeros(outputs, features.shape[1]))
    errors: list[float] = []
    for taken in range(max_iter + 1):
        errors.append(point.error)
        enough = max(tol * point.scale, point.rounding())
        if point.error <= enough:
            return point.weights
        # steps that are solved the better the nearer the end, and never better than needed
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
        f"{point.error:.3g}, {relative:.3g} times that of the penalty's (asked: tol={tol:g}). "
        "Raise `l2`, `max_iter` or `tol`; a loss that is not convex and twice differentiable in "
        "the outputs, or computes in float32, does not get there"
    )
