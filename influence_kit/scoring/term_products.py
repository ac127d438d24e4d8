"""The terms of test examples: how fast they change along gradients of training examples.

Shapes: q test examples, t terms of each, b training examples, P chosen parameters.

The score of a term l_s with a training gradient u is <grad l_s, u>, the derivative of l_s at the
parameters along u: one forward-mode pass over the test examples gives it for all terms at once, and
no gradient of a term is made.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from influence_kit.core.dtypes import real, restored
from influence_kit.core.memory import rows_within, workspace_bytes
from influence_kit.data.batches import Batch, call_arguments, call_model, example_count
from influence_kit.gradients.batch_memory import kept_bytes
from influence_kit.gradients.per_example import Gradients
from influence_kit.losses.token_losses import term_values, terms_of
from influence_kit.operators.partition import Partition
from influence_kit.operators.products import Tree, forward_product
from influence_kit.scoring.token_side import TokenSide


@dataclass
class TermProducts:
    """The terms of some test examples.

    Args:
        tokens: the side that they belong to.
        batch: the test examples, on the device of the model, with a checkpoint in it.
        factors: what to multiply the scores of each by, ``[q]``; None for 1.
    """

    tokens: TokenSide
    batch: Batch
    factors: Tensor | None
    length: int = field(init=False)

    def __post_init__(self) -> None:
        with torch.no_grad():
            outputs = call_model(self.tokens.source.capture.model, self.batch)
            self.length = terms_of(self.tokens.loss, outputs, self.batch).values.shape[1]

    def along(self, train: Gradients) -> Tensor:
        """The scores ``[q * t, b]`` with training gradients, with the checkpoint in the model."""
        size = sum(shape.numel() for shape in train.parameters.values())
        capture = self.tokens.source.capture
        kept = example_count(self.batch) * kept_bytes(capture.model, self.batch)
        budget = 8 * workspace_bytes(train.sample.device)
        step = rows_within(budget, kept + 2 * size * train.sample.element_size())
        starts = range(0, train.n, step)
        parts = [self._along(train.rows(slice(a, a + step)).flat()) for a in starts]
        found = torch.cat(parts)
        if self.factors is not None:
            found = found * self.factors[:, None]
        return found.flatten(1).T

    def _along(self, vectors: Tensor) -> Tensor:
        """``[b, q, t]``, for vectors ``[b, P]``."""
        capture = self.tokens.source.capture
        values = {name: real(p.detach()) for name, p in capture.parameters.items()}
        shapes = {name: value.shape for name, value in values.items()}
        trees = Partition({"all": list(shapes)}, shapes).split(vectors)
        along = {name: tree.to(values[name].dtype) for name, tree in trees.items()}
        found = self.tokens.either_mode(partial(forward_product, self._terms, values, along))
        return found.to(vectors)

    def _terms(self, values: Tree) -> Tensor:
        capture = self.tokens.source.capture
        args, kwargs = call_arguments(capture.model, self.batch)
        own = {name: restored(value, capture.parameters[name]) for name, value in values.items()}
        outputs: Any = functional_call(capture.model, own, args, kwargs)
        return term_values(self.tokens.loss, outputs, self.batch)
