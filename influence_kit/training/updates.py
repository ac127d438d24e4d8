"""The updates of SGD, Adam and AdamW as functions, and their derivatives.

An update is elementwise: entry j of the new weights and of the optimizer's new tensors depends on
entry j of the old ones and of the gradient. So each derivative of one tensor in another is a tensor
of the same shape, and an adjoint is carried back by products of entries.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# the weights, the gradient, and the optimizer's tensors by name
Values = dict[str, Tensor]
WEIGHT, GRADIENT, COUNT = "weight", "gradient", "step"


@dataclass(frozen=True)
class Transition:
    """An update of one parameter at one point.

    Args:
        after: the weights and the optimizer's tensors after the update.
        slopes: the derivative of each tensor after the update in each one before it, entry by
            entry; without those that are zero.
    """

    after: Values
    slopes: Mapping[str, Values]

    def pull(self, adjoint: Mapping[str, Tensor]) -> Values:
        """The adjoints of the weights, the gradient and the optimizer's tensors before the update.

        Args:
            adjoint: the adjoints of those after it, ``[m, *shape]``; one that lacks is zero.
        """
        before: Values = {}
        for name, later in adjoint.items():
            for earlier, slope in self.slopes.get(name, {}).items():
                if earlier in before:
                    before[earlier].addcmul_(later, slope)
                else:
                    before[earlier] = later * slope
        return before


def transition(optimizer: str, options: Mapping[str, Any], before: Values) -> Transition:
    """The update of one parameter, with its derivatives.

    Args:
        optimizer: "SGD", "Adam" or "AdamW".
        options: of its parameter group.
        before: its weights, gradient, and tensors of the optimizer.
    """
    leaves = {
        name: value.detach().clone().requires_grad_(name != COUNT) for name, value in before.items()
    }
    with torch.enable_grad():
        after = _UPDATES[optimizer](options, leaves)
    inputs = {name: value for name, value in leaves.items() if value.requires_grad}
    slopes = {name: _slopes(value, inputs) for name, value in after.items() if name != COUNT}
    return Transition({name: value.detach() for name, value in after.items()}, slopes)


def _slopes(value: Tensor, inputs: Mapping[str, Tensor]) -> Values:
    if not value.requires_grad:
        return {}
    found = torch.autograd.grad(
        value.sum(), list(inputs.values()), retain_graph=True, allow_unused=True
    )
    return {name: slope for name, slope in zip(inputs, found, strict=True) if slope is not None}


def _sgd(options: Mapping[str, Any], before: Values) -> Values:
    weight, gradient = before[WEIGHT], before[GRADIENT]
    if options["maximize"]:
        gradient = -gradient
    if options["weight_decay"] != 0:
        gradient = gradient + options["weight_decay"] * weight
    after: Values = {}
    momentum = options["momentum"]
    if momentum != 0:
        buffer = before.get("momentum_buffer")
        # torch's first step takes the gradient without dampening
        moved = (
            gradient
            if buffer is None
            else momentum * buffer + (1 - options["dampening"]) * gradient
        )
        after["momentum_buffer"] = moved
        gradient = gradient + momentum * moved if options["nesterov"] else moved
    after[WEIGHT] = weight - options["lr"] * gradient
    return after


def _adam(options: Mapping[str, Any], before: Values, decoupled: bool = False) -> Values:
    weight, gradient = before[WEIGHT], before[GRADIENT]
    if options["maximize"]:
        gradient = -gradient
    decay, lr = options["weight_decay"], options["lr"]
    if decay != 0 and (decoupled or options.get("decoupled_weight_decay")):
        weight = weight * (1 - lr * decay)
    elif decay != 0:
        gradient = gradient + decay * weight
    first_beta, second_beta = options["betas"]
    zeros = torch.zeros_like(weight)
    count = float(before[COUNT]) + 1 if COUNT in before else 1.0
    first = first_beta * before.get("exp_avg", zeros) + (1 - first_beta) * gradient
    second = second_beta * before.get("exp_avg_sq", zeros) + (1 - second_beta) * gradient.square()
    after = {COUNT: torch.tensor(count), "exp_avg": first, "exp_avg_sq": second}
    if options["amsgrad"]:
        second = torch.maximum(before.get("max_exp_avg_sq", zeros), second)
        after["max_exp_avg_sq"] = second
    scale = _root(second) / (1 - second_beta**count) ** 0.5 + options["eps"]
    after[WEIGHT] = weight - lr / (1 - first_beta**count) * first / scale
    return after


def _root(square: Tensor) -> Tensor:
    """The square root, with slope 0 at 0: where no gradient has come yet, the mean is 0, too."""
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)


def _adamw(options: Mapping[str, Any], before: Values) -> Values:
    return _adam(options, before, decoupled=True)


_UPDATES: Mapping[str, Callable[[Mapping[str, Any], Values], Values]] = {
    "SGD": _sgd,
    "Adam": _adam,
    "AdamW": _adamw,
}
