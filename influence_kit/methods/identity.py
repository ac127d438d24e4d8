"""What kept or saved numbers belong to: weights, data and loss, as a description can say it."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from influence_kit.checkpoints.loader import CheckpointLoader
from influence_kit.curvature.passes import DataSet
from influence_kit.data.batches import Batch, call_model, example_count, take
from influence_kit.gradients.gradient_source import GradientSource
from influence_kit.losses.loss import Loss
from influence_kit.storage.folders import LOSSES, hash_of

# examples whose losses tell one loss from another
FEW = 8


def identity(
    loader: CheckpointLoader,
    checkpoints: int,
    source: GradientSource,
    losses: Sequence[Loss],
    batches: Iterable[Batch],
) -> dict[str, Any]:
    """Weights, precision, examples and losses: a pass over the data, a few examples of the model.

    All of the data is hashed, so that no other data is taken for it: a second a gigabyte of
    tensors, far less than it takes most data sets to make them.

    Args:
        loader: of the checkpoints, in a session.
        checkpoints: how many there are.
        source: of the model's gradients.
        losses: the functions that are differentiated, or that decide otherwise.
        batches: the data.
    """
    prints = []
    for place in range(checkpoints):
        loader.load(place)
        prints.append(list(loader.fingerprint(place)))
    parameter = next(iter(source.capture.parameters.values()))
    data = DataSet(batches, parameter.device, name="the data set")
    found = [value for loss in losses for value in _first_losses(source, loss, data)]
    counts: list[int] = []
    digest = hash_of(_noting(counts, batches))
    return {
        "dtype": str(parameter.dtype),
        "weights of the checkpoints": prints,
        "examples": sum(counts),
        "hash of the examples": digest,
        LOSSES: found,
    }


def _noting(counts: list[int], batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches, whose numbers of examples are noted on their way."""
    for batch in batches:
        counts.append(example_count(batch))
        yield batch


def _first_losses(source: GradientSource, loss: Loss, data: DataSet) -> list[float]:
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
