"""The protocol of an observer that follows a pass over the training set."""

from typing import Protocol

from torch import Tensor

from influence_kit.gradients.per_example import Gradients


class Watch(Protocol):
    """Observes what a pass computes for its first term, without changing it.

    Shapes: m test examples, n training examples.
    """

    def see_tests(self, gradients: Gradients) -> None:
        """Gets the test gradients, before the inverse curvature is applied."""

    def see_scores(self, train: Gradients, scores: Tensor) -> None:
        """Gets the training gradients of a batch, and the scores ``[m, n]`` of its examples."""

    def finish(self) -> None:
        """Called at the end of the pass."""
