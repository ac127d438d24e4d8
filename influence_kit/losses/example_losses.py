"""The loss of each example of a batch, with a graph, from the outputs of the whole batch.

Shapes: n examples of a batch.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from influence_kit.data.batches import Batch, targets_of
from influence_kit.losses.loss import Loss, LossFunction
from influence_kit.losses.reduction_check import loss_of_some

# losses of torch with one value per entry, whose mean over a batch is a plain mean
UNREDUCED = (
    nn.CrossEntropyLoss,
    nn.NLLLoss,
    nn.MSELoss,
    nn.L1Loss,
    nn.SmoothL1Loss,
    nn.HuberLoss,
    nn.BCELoss,
    nn.BCEWithLogitsLoss,
)


def example_losses(
    loss: Loss, loss_fn: LossFunction | None, outputs: Any, batch: Batch, n: int
) -> Tensor | None:
    """The losses ``[n]``; None for a loss that the model computes for the whole batch at once.

    Args:
        loss: the loss, whose reduction has been found.
        loss_fn: the user's function that it calls.
        outputs: the model's outputs.
        batch: the batch.
        n: the number of its examples.
    """
    found = _of_entries(loss_fn, outputs, targets_of(batch), n)
    if found is not None:
        return found
    value = loss.values(outputs, batch)
    if value.dim() > 0:
        loss.summed(value, batch, n)  # its check of the shape
        return value.reshape(n, -1).sum(1)
    if n == 1:
        return value.reshape(1)
    return _one_by_one(loss.values, outputs, batch, n) if loss.is_of_outputs else None


def _of_entries(loss_fn: LossFunction | None, outputs: Any, targets: Any, n: int) -> Tensor | None:
    """Torch's own loss with a value per entry, and the mean or sum of each example's."""
    reduced = getattr(loss_fn, "reduction", None) in ("mean", "sum")
    plain = type(loss_fn) in UNREDUCED and getattr(loss_fn, "weight", None) is None
    if not (reduced and plain and isinstance(outputs, Tensor) and isinstance(targets, Tensor)):
        return None
    ignored = getattr(loss_fn, "ignore_index", None)
    if ignored is not None and bool((targets == ignored).any()):
        return None
    if isinstance(loss_fn, nn.MSELoss):
        if outputs.shape != targets.shape:
            return None
        values = (outputs - targets).square()  # can be differentiated more often than torch's
    else:
        entries: Any = copy.copy(loss_fn)
        entries.reduction = "none"
        values = entries(outputs, targets)
    if values.dim() == 0 or len(values) != n:
        return None
    rows = values.reshape(n, -1)
    return rows.mean(1) if getattr(loss_fn, "reduction", None) == "mean" else rows.sum(1)


def _one_by_one(
    values: Callable[[Any, Batch], Tensor], outputs: Any, batch: Batch, n: int
) -> Tensor | None:
    """A reduced loss of the outputs of one example at a time."""
    indices = torch.arange(n)
    for axis in (0, 1):
        found = [loss_of_some(values, outputs, batch, row, n, axis) for row in indices.split(1)]
        losses = [loss.reshape(()) for loss in found if loss is not None and loss.numel() == 1]
        if len(losses) == n:
            return torch.stack(losses)
    return None
