"""What cached or saved numbers belong to: weights, data and loss, described in JSON types."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from influence_kit.checkpoints.loader import CheckpointLoader
from influence_kit.curvature.passes import Spread
from influence_kit.data.batches import Batch, call_model, example_count, take, to_device
from influence_kit.gradients.feature_map import FeatureMap
from influence_kit.losses.loss import Loss
from influence_kit.storage.folders import LOSSES, NORMS, hash_of

# examples, to twice as many, whose losses and gradients identify a model, a loss and a feature map
FEW = 16


def identity(
    loader: CheckpointLoader,
    checkpoints: int,
    features: FeatureMap,
    loss: Loss,
    batches: Iterable[Batch],
) -> dict[str, Any]:
    """Weights, parameters, examples, losses and gradients: what stored numbers belong to.

    One pass over the data, and the gradients of a few examples spread over it. All of the data is
    hashed, so that changed data is detected: a second per gigabyte of tensors, far less than most
    data sets take to produce them.

    Args:
        loader: loads the checkpoints, in a session.
        checkpoints: the number of checkpoints.
        features: the feature map of the method, bound to its model.
        loss: the training loss.
        batches: the data.
    """
    prints = []
    for index in range(checkpoints):
        loader.load(index)
        prints.append(list(loader.fingerprint(index)))
    parameters = features.source.capture.parameters
    first = next(iter(parameters.values()))
    sample, counts = Spread(FEW), [0]
    digest = hash_of(_noting(counts, sample, batches))
    some = [to_device(batch, first.device) for _, batch in sample.taken]
    return {
        "dtype": str(first.dtype),
        "parameters": {name: list(p.shape) for name, p in parameters.items()},
        "weights of the checkpoints": prints,
        "examples": counts[0],
        "hash of the examples": digest,
        **_measured(features, loss, some, max(checkpoints - 1, 0)),
    }


def _noting(counts: list[int], sample: Spread, batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches; their examples are counted, and some are taken, as they pass."""
    for batch in batches:
        n = example_count(batch)
        sample.add(torch.arange(counts[0], counts[0] + n), batch)
        counts[0] += n
        yield batch


def _measured(
    features: FeatureMap, loss: Loss, batches: Iterable[Batch], checkpoint: int
) -> dict[str, Any]:
    """Losses of the examples, and squared norms of their features, by example and parameter."""
    values: list[float] = []
    norms: list[list[float]] = []
    source = features.source
    for batch in batches:
        for one in features.identifying_losses(loss):
            source.prepare(batch, one)
            for index in range(example_count(batch)):
                example = take(batch, slice(index, index + 1))
                with torch.no_grad():
                    outputs = call_model(source.capture.model, example)
                    values.append(float(one.total(outputs, example, 1)))
        found = features.cached(checkpoint, batch, loss)
        squares = [found.squared_norms_of([name]).tolist() for name in found.parameters]
        norms += [list(own) for own in zip(*squares, strict=True)]
    return {LOSSES: values, NORMS: norms}
