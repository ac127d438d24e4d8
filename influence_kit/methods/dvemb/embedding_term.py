"""The term of ``DVEmb``: embeddings of training examples, read by index.

Shapes: n training examples.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from influence_kit.data.batches import Batch
from influence_kit.gradients.per_example import Gradients
from influence_kit.methods.gradient_cache import CachedBatch
from influence_kit.scoring.term import Term


@dataclass(frozen=True)
class EmbeddingTerm(Term):
    """A term whose training features are embeddings read by index.

    Args:
        own: returns the gradients of the same examples, for self-influence.
    """

    own: Callable[[Batch], Gradients] = field(kw_only=True)

    def self_products(self, batch: Batch) -> tuple[Gradients, Tensor]:
        train = self.train(batch)
        return train, self.own(batch).paired(train)


def index_batches(n: int, rows: int) -> Iterable[Batch]:
    """The indices of n training examples, in batches of at most ``rows``."""
    return [CachedBatch((indices,)) for indices in torch.arange(n).split(rows)]
