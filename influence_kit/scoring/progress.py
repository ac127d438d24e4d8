"""Looking on while a pass computes scores."""

from typing import Protocol

from torch import Tensor

from influence_kit.gradients.per_example import Gradients


class Watch(Protocol):
    """Sees what a pass computes for its first term, and changes nothing of it.

    Shapes: m test and n training examples.
    """

    def see_tests(self, gradients: Gradients) -> None:
        """The test gradients, before they are solved for."""

    def see_scores(self, train: Gradients, scores: Tensor) -> None:
        """The training side of a batch, and the scores ``[m, n]`` of its examples."""

    def finish(self) -> None:
        """The pass is done."""
