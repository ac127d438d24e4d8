"""score(test, train) = sum over terms of weight * <test side, train side>: a method, as data."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from influence_kit.data.batches import Batch
from influence_kit.gradients.per_example import Gradients, Transform


@dataclass(frozen=True)
class Side:
    """What a batch is turned into at a checkpoint.

    Args:
        checkpoint: the number of the checkpoint that must be in the model.
        features: a batch's features, per example and parameter.
        transforms: applied to the features of each batch, in order.
        solve: a linear map that is applied once to all examples of the side together (or to their
            sum): one that costs passes over a data set.
    """

    checkpoint: int
    features: Callable[[Batch], Gradients]
    transforms: tuple[Transform, ...] = ()
    solve: Transform | None = None

    def __call__(self, batch: Batch) -> Gradients:
        """The side of every example of a batch."""
        return self.transformed(self.features(batch))

    def transformed(self, gradients: Gradients) -> Gradients:
        """The side of features that are there already."""
        for transform in self.transforms:
            gradients = transform(gradients)
        return gradients

    def solved(self, gradients: Gradients) -> Gradients:
        """The side of all its examples, finished."""
        return gradients if self.solve is None else self.solve(gradients)


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

    @property
    def is_symmetric(self) -> bool:
        """Whether both sides do the same to the features."""
        return (self.test.transforms, self.test.solve) == (self.train.transforms, self.train.solve)

    def self_products(self, batch: Batch) -> tuple[Gradients, Tensor]:
        """The training side of a batch and each example's product with its own test side, ``[n]``.

        Both sides are made of the training features: an example's influence on its own loss.
        """
        features = self.train.features(batch)
        train = self.train.transformed(features)
        if self.is_symmetric:
            return train, train.squared_norms()
        return train, self.test.solved(self.test.transformed(features)).paired(train)

    def weight_at(self, learning_rate: float) -> float:
        """The weight, given the checkpoint's learning rate."""
        return learning_rate if self.weight == "learning rate" else self.weight
