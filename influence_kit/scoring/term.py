"""score(test, train) = sum over terms of weight * <test side, train side>: a method, as data."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from influence_kit.data import Batch
from influence_kit.gradients.per_example import Gradients

Transform = Callable[[Gradients], Gradients]


@dataclass(frozen=True)
class Side:
    """What a batch is turned into at a checkpoint.

    Args:
        checkpoint: the number of the checkpoint that must be in the model.
        features: a batch's features, per example and parameter.
        transforms: applied to the features in order.
    """

    checkpoint: int
    features: Callable[[Batch], Gradients]
    transforms: tuple[Transform, ...] = ()

    def __call__(self, batch: Batch) -> Gradients:
        """The side of every example of a batch."""
        found = self.features(batch)
        for transform in self.transforms:
            found = transform(found)
        return found


@dataclass(frozen=True)
class Term:
    """One summand of a score.

    Args:
        test: the test examples' side.
        train: the training examples' side.
        weight: a number, or the learning rate that comes with the training side's checkpoint.
    """

    test: Side
    train: Side
    weight: float | Literal["learning rate"] = "learning rate"

    def weight_at(self, learning_rate: float) -> float:
        """The weight, given the checkpoint's learning rate."""
        return learning_rate if self.weight == "learning rate" else self.weight
