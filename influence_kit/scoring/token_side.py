"""A side of a term by token: the features of tokens, each like an example.

Shapes: n examples of a batch, t tokens of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from influence_kit.core.memory import resident_bytes, rows_within
from influence_kit.data.batches import Batch
from influence_kit.gradients.per_example import Gradients, Transform
from influence_kit.gradients.token_source import TokenSource
from influence_kit.losses.loss import Loss
from influence_kit.operators.products import EitherMode
from influence_kit.scoring.transforms import unit_influence, unit_norm


class TokenRows(NamedTuple):
    """The features of some tokens of a batch.

    Attributes:
        rows: which tokens, j * t + s for token s of example j.
        gradients: their features.
        length: t.
    """

    rows: Tensor
    gradients: Gradients
    length: int


@dataclass(frozen=True)
class TokenSide:
    """The tokens of a side.

    Args:
        features: the features of a batch, from ``source``.
        source: gradients of tokens, or of whole examples.
        transforms: those of the side.
        row_bytes: the memory that one token's features take while they are made; 0 if little.
        loss: the loss of the examples.
    """

    features: Callable[[Batch], Gradients]
    source: TokenSource
    transforms: tuple[Transform, ...]
    row_bytes: int
    loss: Loss
    # forward mode, until the model has an operation without it
    either_mode: EitherMode = field(default_factory=lambda: EitherMode("scores of terms are"))

    def __call__(self, batch: Batch, n: int, part: slice | None = None) -> Iterator[TokenRows]:
        """The features of all tokens of a batch of n examples, some at a time.

        Args:
            batch: the batch, on the model's device, whose checkpoint is in the model.
            n: the number of its examples.
            part: some of the n * t positions, or of the t terms of all examples.
        """
        source = self.source
        factors = self._factors(self.whole(batch))
        total = n * source.count if source.by == "position" else source.count
        chosen = range(total)[part or slice(None)]
        step = self._step(n) or max(1, len(chosen))
        for start in range(chosen.start, chosen.stop, step):
            source.part = slice(start, min(start + step, chosen.stop))
            found = self.features(batch)
            yield TokenRows(source.rows, self._scaled(found, factors), source.count)
        source.forget()

    def factors(self, whole: Gradients) -> Tensor | None:
        """What the transforms multiply each example by, given its features, ``[n]``; or None."""
        found = self._factors(whole)
        return torch.stack(found).prod(0) if found else None

    @property
    def is_plain(self) -> bool:
        """Whether the features are gradients, each at most multiplied by a number."""
        return not self.row_bytes and all(is_scale(transform) for transform in self.transforms)

    def whole(self, batch: Batch) -> Gradients:
        """The features of whole examples, captured and compared with autograd."""
        self.source.forget()
        self.source.whole = True
        found = self.features(batch)
        self.source.whole = False
        return found

    def _step(self, n: int) -> int | None:
        """How many positions, or terms of n examples, to do at a time; None for all."""
        if not self.row_bytes:
            return None
        rows = rows_within(resident_bytes(self.source.device) // 4, self.row_bytes)
        return rows if self.source.by == "position" else max(1, rows // n)

    def _factors(self, whole: Gradients) -> list[Tensor]:
        """What the transforms multiply each example by, ``[n]`` each."""
        factors = []
        if any(is_scale(transform) for transform in self.transforms):
            for transform in self.transforms:
                scaled = transform(whole)
                if is_scale(transform):
                    factors.append(_factor(scaled, whole))
                whole = scaled
        return factors

    def _scaled(self, tokens: Gradients, factors: list[Tensor]) -> Gradients:
        examples = torch.div(self.source.rows, self.source.count, rounding_mode="floor")
        supply = iter(factors)
        for transform in self.transforms:
            if is_scale(transform):
                tokens = tokens.scaled(next(supply)[examples])
            else:
                tokens = transform(tokens)
        return tokens


def is_scale(transform: Transform) -> bool:
    """Whether a transform multiplies each example's gradient by a number that depends on it."""
    is_influence = isinstance(transform, partial) and transform.func is unit_influence
    return transform is unit_norm or is_influence


def is_linear(transform: Transform) -> bool:
    """Whether a transform is known to be a linear map of gradients."""
    return bool(getattr(transform, "is_linear", False))


def _factor(scaled: Gradients, whole: Gradients) -> Tensor:
    """The factor ``[n]`` between gradients and their multiples; 0 for gradients that are zero."""
    _, squares, powers = whole.balanced()
    _, of_scaled, powers_of_scaled = scaled.balanced()
    ratios = of_scaled / squares.masked_fill(squares == 0, 1)
    return ratios.sqrt() * torch.exp2(powers_of_scaled - powers)
