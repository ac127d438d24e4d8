"""The data that an inverse curvature is fitted to: examples and gradients at one checkpoint.

Shapes: n examples of a batch, k vectors of P entries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from influence_kit.curvature.observed_gradients import ObservedGradients
from influence_kit.curvature.passes import DataSet, Features, Memory, Remembered
from influence_kit.curvature.sampled_slopes import OF_SLOPES, SampledSlopes
from influence_kit.data.batches import Batch
from influence_kit.gradients.feature_map import FeatureMap
from influence_kit.gradients.gradient_source import GradientSource
from influence_kit.gradients.per_example import Gradients, Transform
from influence_kit.losses.loss import Loss
from influence_kit.operators.partition import Partition

# a difference that seeds of a user are unlikely to have
OTHER_DRAW = 0x5851F42D4C957F2D


@dataclass
class FitData:
    """The examples that a curvature is a mean over, with the model at one checkpoint.

    Args:
        examples: passes over their batches.
        loss: the training loss.
        map: the feature map of the method.
        partition: the parameters (or features) in blocks.
        sample: an empty tensor with the dtype and device of scores.
        memory: where gradients are cached for further passes.
        cached: returns the features of a batch of ``examples`` at its own labels, from a cache or
            computed.
        training_count: returns the number of training examples.
        is_of_training: whether the examples are the training set.
        evaluation: passes over evaluation examples, and their features given their indices and
            batch; None if there are none.
        checkpoints: all checkpoints of the method.
        loader: the data loader of the examples.
        argument: the damping as given, for errors.
        said: the warnings that the method has given; a fit adds its own, and repeats none.
    """

    examples: DataSet
    loss: Loss
    map: FeatureMap
    partition: Partition
    sample: Tensor
    memory: Memory
    cached: Callable[[Batch], Gradients]
    training_count: Callable[[], int]
    checkpoints: Sequence[Any]
    loader: Any
    is_of_training: bool = True
    argument: str = "damping"
    said: set[str] = field(default_factory=set)
    evaluation: tuple[DataSet, Features] | None = None

    @property
    def source(self) -> GradientSource:
        """The gradients of the model."""
        return self.map.source

    @property
    def model(self) -> nn.Module:
        """The model, with the checkpoint in it."""
        return self.source.capture.model

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """The chosen parameters by name."""
        return self.source.capture.parameters

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.sample.device

    @property
    def checkpoint(self) -> int:
        """The index of the checkpoint."""
        return self.examples.checkpoint

    @property
    def count(self) -> int:
        """The number of examples."""
        return self.examples.count

    def slopes(self, seed: int, draw: int = 0) -> SampledSlopes:
        """Samples slopes from the model; those of another draw are independent."""
        return SampledSlopes(self.model, self.loss, (seed + draw * OTHER_DRAW) % 2**63)

    def features(self, curvature: str, seed: int, draw: int = 0) -> Features:
        """The gradients whose outer products are the empirical Fisher, or the Fisher.

        Args:
            curvature: "empirical_fisher" (labels of the data) or "fisher" (slopes sampled from the
                model).
            seed: the seed of the sampled slopes.
            draw: the number of the draw; slopes of different draws are independent.
        """
        slopes = self.slopes(seed, draw)

        def features(indices: Tensor, batch: Batch) -> Gradients:
            if curvature == "empirical_fisher":
                return self.map.of_cached(self.cached(batch))
            self.source.prepare(batch, self.loss, int(indices[0]))
            return self.map.features(self.checkpoint, slopes(indices, batch), OF_SLOPES)

        return self.remembered(features)

    def observed(self, seed: int, draw: int, at_data: bool) -> ObservedGradients:
        """Gradients at slopes of a draw, or at labels of the data, with the labels' statistics."""

        def prepare(indices: Tensor, batch: Batch) -> None:
            self.source.prepare(batch, self.loss, int(indices[0]))

        gradients = partial(self.map.features, self.checkpoint)
        return ObservedGradients(prepare, gradients, self.slopes(seed, draw), at_data)

    def remembered(self, features: Features) -> Features:
        """The same features, cached for further passes while memory lasts."""
        return Remembered(features, self.memory)

    def through(self, solve: Callable[[Tensor], Tensor]) -> Transform:
        """A map of vectors ``[k, P]`` as a map of gradients."""
        return through(self.partition, solve)


def through(partition: Partition, solve: Callable[[Tensor], Tensor]) -> Transform:
    """A map of vectors ``[k, P]`` as a map of gradients."""

    def transform(gradients: Gradients) -> Gradients:
        return partition.gradients(solve(partition.flat(gradients)), gradients)

    return transform
