"""The loss of a training step: as the loop computed it, and with a weight for each example.

Shapes: n examples of a micro-batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from influence_kit.data.batches import Batch, call_model, example_count, take
from influence_kit.errors import InvalidArgumentError
from influence_kit.losses.example_losses import example_losses
from influence_kit.losses.loss import Loss, LossFunction
from influence_kit.training.step import Reduction


@dataclass(frozen=True)
class StepLoss:
    """The loss of the micro-batches of a run.

    Args:
        model: the model.
        loss_fn: the user's loss; None for the model's own.
        settled: the same loss, whose reduction has been found.
    """

    model: nn.Module
    loss_fn: LossFunction | None
    settled: Loss

    def plain(self, batch: Batch, reduction: Reduction) -> Tensor:
        """The loss of a batch by the same operations as in an ordinary loop."""
        outputs = call_model(self.model, batch)
        # of a model's own loss not the formula that was found to equal it
        value = Loss(self.loss_fn, None, "loss_fn").values(outputs, batch)
        n = example_count(batch)
        if value.dim() > 0:
            total = self.settled.summed(value, batch, n)
            return total / n if reduction == "mean" else total
        own = "sum" if self.settled.reduction == "sum" else "mean"
        if own == reduction:
            return value
        return value / n if reduction == "mean" else value * n

    def weighted(self, batch: Batch, reduction: Reduction, weights: Tensor) -> Tensor:
        """The loss of a batch with a weight ``[n]`` on the loss of each example."""
        n = example_count(batch)
        losses = losses_alone(self.model, self.settled, self.loss_fn, batch)
        total = (weights.to(losses) * losses).sum()
        return total / n if reduction == "mean" else total


def losses_alone(
    model: nn.Module, loss: Loss, loss_fn: LossFunction | None, batch: Batch
) -> Tensor:
    """The loss of each example of a batch, ``[n]``.

    Args:
        model: the model.
        loss: the loss, whose reduction has been found.
        loss_fn: the user's function that it calls; None for the model's own loss.
        batch: the batch.

    Raises:
        InvalidArgumentError: for a model that computes one loss for a whole batch, with dropout.
    """
    n = example_count(batch)
    found = example_losses(loss, loss_fn, call_model(model, batch), batch, n)
    if found is not None:
        return found
    before = torch.get_rng_state()
    losses = []
    for row in range(n):
        one = take(batch, slice(row, row + 1))
        losses.append(loss.values(call_model(model, one), one).reshape(()))
    if not torch.equal(before, torch.get_rng_state()):
        raise InvalidArgumentError(
            "the model computes one loss for a whole batch and draws random numbers (dropout), so "
            "that the loss of each example cannot be had: pass a `loss_fn` that returns one value "
            "per example"
        )
    return torch.stack(losses)
