"""A training side that is no function of examples, but looked up by their indices.

Shapes: n training examples.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from influence_kit.data.batches import Batch
from influence_kit.gradients.per_example import Gradients
from influence_kit.methods.gradient_cache import Places
from influence_kit.scoring.term import Term


@dataclass(frozen=True)
class EmbeddingTerm(Term):
    """A term whose training side is looked up.

    Args:
        own: gives the gradients of the same examples: their test side.
    """

    own: Callable[[Batch], Gradients] = field(kw_only=True)

    def self_products(self, batch: Batch) -> tuple[Gradients, Tensor]:
        train = self.train(batch)
        return train, self.own(batch).paired(train)


def index_batches(n: int, rows: int) -> Iterable[Batch]:
    """What stands for the batches of n training examples, of at most so many each."""
    return [Places((indices,)) for indices in torch.arange(n).split(rows)]
