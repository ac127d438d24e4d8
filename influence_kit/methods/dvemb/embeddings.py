"""The embeddings of the training examples, cached."""

from torch import Tensor

from influence_kit.methods.caches import Cache


class Embeddings(Cache):
    """The cached embeddings of the training examples."""

    of_checkpoints = False  # they depend on the weights in the trace
    rows: Tensor | None = None

    @property
    def since(self) -> str | None:
        """What was done when they were computed."""
        return None if self.rows is None else "the training examples were embedded"

    def clear(self) -> None:
        """Drop them."""
        self.rows = None
