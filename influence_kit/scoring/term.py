"""A method as data: score = sum over terms of weight * <test gradient, training gradient>."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from influence_kit.core.arguments import check_count, check_function, check_number, shown
from influence_kit.core.objects import is_one_of
from influence_kit.data.batches import Batch
from influence_kit.errors import InvalidArgumentError
from influence_kit.gradients.per_example import Gradients, Transform


@dataclass(frozen=True)
class Side:
    """The test or training gradients of a term: features of a batch at a checkpoint, transformed.

    Args:
        checkpoint: the index of the checkpoint that must be in the model.
        features: returns a batch's features, per example and parameter.
        transforms: applied to the features of each batch, in order.
        solve: a linear map that is applied once to all examples together (or to their sum),
            because it takes passes over a data set.
    """

    checkpoint: int
    features: Callable[[Batch], Gradients]
    transforms: tuple[Transform, ...] = ()
    solve: Transform | None = None

    def __post_init__(self) -> None:
        check_count(self.checkpoint, "checkpoint", least=0)
        check_function(self.features, "features", "features(batch) -> Gradients")
        if not isinstance(self.transforms, tuple):
            raise InvalidArgumentError(
                f"`transforms` must be a tuple of functions; got {shown(self.transforms)}"
            )
        solve = () if self.solve is None else (self.solve,)
        for name, functions in (("transforms", self.transforms), ("solve", solve)):
            for function in functions:
                check_function(function, name, "transform(gradients) -> gradients")

    def __call__(self, batch: Batch) -> Gradients:
        """The gradients of every example of a batch, without ``solve``."""
        return self.transformed(self.features(batch))

    def transformed(self, gradients: Gradients) -> Gradients:
        """The transforms of given features."""
        for transform in self.transforms:
            gradients = transform(gradients)
        return gradients

    def solved(self, gradients: Gradients) -> Gradients:
        """``solve`` applied to the gradients of all examples."""
        return gradients if self.solve is None else self.solve(gradients)


@dataclass(frozen=True)
class Term:
    """One summand of a score.

    Args:
        test: the test gradients.
        train: the training gradients.
        weight: a number, or the learning rate of the checkpoint of ``train``.
    """

    test: Side
    train: Side
    weight: float | Literal["learning rate"] = "learning rate"

    def __post_init__(self) -> None:
        for name, side in (("test", self.test), ("train", self.train)):
            if not isinstance(side, Side):
                raise InvalidArgumentError(
                    f"`{name}` must be a Side, as `test_at` and `train_at` return it; got "
                    f"{shown(side)}"
                )
        if not is_one_of(self.weight, ("learning rate",)):
            check_number(self.weight, "weight", instead='"learning rate"')

    @property
    def is_symmetric(self) -> bool:
        """Whether test and training gradients have the same transforms."""
        return (self.test.transforms, self.test.solve) == (self.train.transforms, self.train.solve)

    def self_products(self, batch: Batch) -> tuple[Gradients, Tensor]:
        """The training gradients of a batch, and each example's score with itself, ``[n]``.

        The test gradients, too, are made from the training features.
        """
        features = self.train.features(batch)
        train = self.train.transformed(features)
        if self.is_symmetric:
            return train, train.squared_norms()
        return train, self.test.solved(self.test.transformed(features)).paired(train)

    def weight_at(self, learning_rate: float) -> float:
        """The weight, given the checkpoint's learning rate."""
        return learning_rate if self.weight == "learning rate" else self.weight
