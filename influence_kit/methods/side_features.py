"""The features of a method's sides, from which its token scores are made, too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from influence_kit.data.batches import Batch
from influence_kit.gradients.feature_map import FeatureMap
from influence_kit.gradients.per_example import Gradients
from influence_kit.losses.loss import Loss


@dataclass(frozen=True)
class SideFeatures:
    """The features of a batch at a checkpoint, by a feature map.

    Args:
        checkpoint: the index of the checkpoint that must be in the model.
        of_batch: returns the features of a batch, which may stand for cached ones.
        loss: the loss of the examples.
        of_tests: whether they are test examples.
    """

    checkpoint: int
    of_batch: Callable[[Batch], Gradients]
    loss: Loss
    of_tests: bool

    def __call__(self, batch: Batch) -> Gradients:
        """The features."""
        return self.of_batch(batch)

    def by(self, features: FeatureMap) -> Callable[[Batch], Gradients]:
        """The same features by another map, which is given batches of examples."""
        of_batch = features.features if self.of_tests else features.train_features
        return partial(_called, of_batch, self.checkpoint, self.loss)


def _called(
    of_batch: Callable[[int, Batch, Loss], Gradients], checkpoint: int, loss: Loss, batch: Batch
) -> Gradients:
    return of_batch(checkpoint, batch, loss)
