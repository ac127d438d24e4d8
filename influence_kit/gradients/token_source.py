"""Gradients of the tokens of a batch, for feature maps: by position, or by term of the loss.

Shapes: n examples of a batch, t tokens of each.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, replace
from typing import Literal

import torch

from influence_kit.core.dtypes import exact
from influence_kit.data.batches import Batch, call_model, map_outputs
from influence_kit.gradients.gradient_source import GradientSource
from influence_kit.gradients.per_example import Gradients, join_examples
from influence_kit.gradients.positions import position_gradients
from influence_kit.losses.loss import Loss
from influence_kit.losses.token_losses import TermLoss, terms_of

By = Literal["position", "term"]


@dataclass
class _Held:
    """A batch that has been captured, and the number of its tokens.

    ``tokens`` are the gradients of its positions, ``counted`` the columns of its terms that may be
    other than zero.
    """

    batch: Batch
    loss: Loss
    whole: Gradients
    count: int
    tokens: Gradients | None = None
    counted: Set[int] = frozenset()


class TokenSource(GradientSource):
    """Gradients of tokens, each like an example.

    Args:
        source: the gradients of examples, which checks what it captures.
        by: "position" for the part of an example's gradient that passes through a position of the
            layers' inputs; "term" for the gradient of the token's own term of the loss.
    """

    def __init__(self, source: GradientSource, by: By) -> None:
        # its state is that of the other source
        self._examples = source
        self.capture, self.verify = source.capture, source.verify
        self.by = by
        # whether a call returns the gradients of whole examples; else of tokens: of some of the
        # n * t positions, or of some of the t terms of all examples
        self.whole = False
        self.part = slice(None)
        # of the last call: t, and which tokens it returned, j * t + s for token s of example j
        self.count = 1
        self.rows = torch.arange(0)
        self._held: _Held | None = None
        self._compared: set[int] = set()

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return next(iter(self.capture.parameters.values())).device

    def forget(self) -> None:
        """Drop the last batch, before other weights are in the model."""
        self._held = None

    def prepare(self, batch: Batch, loss: Loss, index: int | None = None) -> None:
        """As of the other source."""
        self._examples.prepare(batch, loss, index)

    def __call__(self, batch: Batch, loss: Loss) -> Gradients:
        """The gradients of a batch: of its tokens, or of its examples if ``whole``."""
        held = self._held
        if held is None or held.batch is not batch or held.loss is not loss:
            held = self._held = self._capture(batch, loss)
        self.count = held.count
        if self.whole:
            return held.whole
        return self._by_position(held) if self.by == "position" else self._by_term(held)

    def _capture(self, batch: Batch, loss: Loss) -> _Held:
        with self.capture.recording(batch) as uses:
            whole = self._examples(batch, loss)
        if self.by == "position":
            found = position_gradients(self.capture, uses, whole, self._compared)
            return _Held(batch, loss, whole, found.length, tokens=found.gradients)
        with torch.no_grad():
            outputs = map_outputs(call_model(self.capture.model, batch), exact)
            terms = terms_of(loss, outputs, batch)
        return _Held(batch, loss, whole, terms.values.shape[1], counted=set(terms.counted))

    def _by_position(self, held: _Held) -> Gradients:
        assert held.tokens is not None
        self.rows = torch.arange(held.tokens.n)[self.part]
        return held.tokens if self.part == slice(None) else held.tokens.rows(self.part)

    def _by_term(self, held: _Held) -> Gradients:
        """The gradients of the chosen terms of each example, the terms next to each other."""
        columns, n = range(held.count)[self.part], held.whole.n
        self.rows = (torch.arange(n)[:, None] * held.count + torch.tensor(columns)).flatten()
        zero = replace(held.whole, forms={})
        parts = [self._of_term(held, s) if s in held.counted else zero for s in columns]
        by_term = join_examples(parts)
        if n == 1 or len(columns) == 1:
            return by_term
        return join_examples([by_term.rows(slice(j, None, n)) for j in range(n)])

    def _of_term(self, held: _Held, column: int) -> Gradients:
        return self.capture(held.batch, TermLoss(held.loss, column)).compact()
