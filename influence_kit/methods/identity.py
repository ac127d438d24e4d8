"""What kept or saved numbers belong to: weights, data and loss, as a description can say it."""

from collections.abc import Iterable
from typing import Any

import torch

from influence_kit.checkpoint_loader import CheckpointLoader
from influence_kit.data import Batch, call_model, example_count, take
from influence_kit.gradients.source import GradientSource
from influence_kit.losses import Loss
from influence_kit.operators.passes import DataSet
from influence_kit.saved import LOSSES, hash_of

# examples whose losses tell one loss from another
FEW = 8


def identity(
    loader: CheckpointLoader,
    checkpoints: int,
    source: GradientSource,
    loss: Loss,
    batches: Iterable[Batch],
) -> dict[str, Any]:
    """Weights, precision, examples and losses: two passes over the data, one batch of the model.

    Args:
        loader: of the checkpoints, in a session.
        checkpoints: how many there are.
        source: of the model's gradients.
        loss: what is differentiated.
        batches: the data.
    """
    prints = []
    for place in range(checkpoints):
        loader.load(place)
        prints.append(list(loader.fingerprint(place)))
    parameter = next(iter(source.capture.parameters.values()))
    data = DataSet(batches, parameter.device)
    return {
        "dtype": str(parameter.dtype),
        "weights of the checkpoints": prints,
        "examples": data.count,
        "hash of the examples": hash_of(batches),
        LOSSES: first_losses(source, loss, data),
    }


def first_losses(source: GradientSource, loss: Loss, data: DataSet) -> list[float]:
    """The losses of a few examples, by which another loss is told."""
    losses: list[float] = []
    model = source.capture.model
    for _, batch in data:
        source.prepare(batch, loss)
        for place in range(min(example_count(batch), FEW - len(losses))):
            one = take(batch, slice(place, place + 1))
            with torch.no_grad():
                losses.append(float(loss.total(call_model(model, one), one, 1)))
        if len(losses) == FEW:
            break
    return losses
