"""The loops over data for token scores: from terms with a side by token to blocks of scores.

Shapes: m test examples, n training examples, t tokens, P parameters.

By token of the training example, the test gradients V are made once and held, and the training set
is read once: the score of a token is <V, its part of the gradient>, delta_s^T V a_s in a linear
layer. By token of the test example, the parts of the test gradients are held and the training
gradients are preconditioned instead, as (C + damping)^-1 is symmetric: memory is that of the test
gradients' factors. If the inverse is not symmetric, or takes longer for the training examples, the
parts are preconditioned, in groups that fit the memory, and each group takes a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from influence_kit.checkpoints.loader import CheckpointLoader
from influence_kit.core.distributed import is_mine
from influence_kit.data.batches import (
    Batch,
    example_count,
    nbytes,
    to_device,
)
from influence_kit.gradients.per_example import Gradients, join_examples
from influence_kit.scoring.finite_tokens import require_finite_features, require_finite_scores
from influence_kit.scoring.side_gradients import SideGradients
from influence_kit.scoring.stream import CHUNK_BYTES
from influence_kit.scoring.term import Term
from influence_kit.scoring.term_products import TermProducts
from influence_kit.scoring.token_groups import Numbered, Piece
from influence_kit.scoring.token_results import Block, TokenScores
from influence_kit.scoring.token_side import TokenSide

Weights = Callable[[], Tensor]


class TokenTerm(NamedTuple):
    """A term, and one of its sides by token."""

    term: Term
    tokens: TokenSide


class _Held(NamedTuple):
    """The tokens of a group of test examples.

    Attributes:
        products: their scores ``[rows, b]`` with training gradients.
        pieces: of each piece, the index of its first row, and the test example and the token of
            each of its rows.
    """

    products: Callable[[Gradients], Tensor]
    pieces: list[tuple[int, Tensor, Tensor]]


@dataclass
class TokenStream:
    """One call for token scores.

    Args:
        terms: the terms of the method.
        loader: loads checkpoints into the model.
        sample: a tensor with the dtype and device of the scores.
        scores: takes the blocks.
        total: the number of training examples, 0 if unknown.
        weights: returns weights of the training examples, to multiply their scores by.
        tick: called after each training batch of each term.
    """

    terms: Sequence[TokenTerm]
    loader: CheckpointLoader
    sample: Tensor
    scores: TokenScores
    total: int
    weights: Weights | None
    tick: Callable[[], None]
    # the numbers of examples that were seen
    m: int = field(default=0, init=False)
    n: int = field(default=0, init=False)

    def of_train(self, inputs: Iterable[Batch], train: Iterable[Numbered], aggregate: bool) -> None:
        """Pass the scores of the tokens of all training examples on."""
        gradients = SideGradients(self.loader, self.sample)
        # before the training examples are divided: every rank takes part in solving
        tests = [gradients.of(term.test, inputs, aggregate) for term, _ in self.terms]
        self.m = tests[0].n
        for chunk in self._chunks(train):
            parts: list[Tensor] = []
            for test, (term, tokens) in zip(tests, self.terms, strict=True):
                weight = term.weight_at(self.loader.load(term.train.checkpoint))
                found = [self._of_train_batch(numbers, term, tokens, test) for numbers in chunk]
                parts = _added(parts, [values * weight for values in found])
            for (indices, _), values in zip(chunk, parts, strict=True):
                self._pass_on(torch.arange(self.m), indices, 0, values)

    def _of_train_batch(
        self, numbers: Numbered, term: Term, tokens: TokenSide, test: Gradients
    ) -> Tensor:
        """The scores ``[m, b, t]`` of one batch and term."""
        indices, batch = numbers
        batch = to_device(batch, self.sample.device)
        n, found = len(indices), self.sample.new_zeros(0)
        for rows, gradients, length in tokens(batch, n):
            if not len(found):
                found = self.sample.new_zeros(test.n, n * length)
            found[:, rows] = gradients.inner(test, max(1, self.total) * length)
        require_finite_scores(found, term, batch, indices, test)
        self.tick()
        return found.view(test.n, n, -1)

    def of_tests(
        self,
        groups: Iterable[Sequence[Piece]],
        train: Callable[[], Iterable[Numbered]],
        solves_tests: bool,
    ) -> None:
        """Pass the scores of the tokens of all test examples on.

        Args:
            groups: pieces of the test examples; each group takes a pass over the training examples.
            train: gives the training examples.
            solves_tests: whether ``solve`` is applied to the test tokens, not to training examples.
        """
        for group in groups:
            self.m = max(self.m, *(piece.start + example_count(piece.batch) for piece in group))
            held = [self._held(group, *one, solves_tests) for one in self.terms]
            for chunk in self._chunks(train()):
                parts: list[Tensor] = []
                for own, (term, _) in zip(held, self.terms, strict=True):
                    weight = term.weight_at(self.loader.load(term.train.checkpoint))
                    found = [self._of_tests_batch(b, term, own, solves_tests) for b in chunk]
                    parts = _added(parts, [rows * weight for rows in found])
                for (indices, _), rows in zip(chunk, parts, strict=True):
                    self._pass_on_pieces(held[0], indices, rows)

    def takes_products(self, solves_tests: bool) -> bool:
        """Whether the scores of terms are made without their gradients."""
        return all(self._takes_products(*one, solves_tests) for one in self.terms)

    def _held(
        self, group: Sequence[Piece], term: Term, tokens: TokenSide, solves_tests: bool
    ) -> _Held:
        """The tokens of a group: their features, or, for terms, what gives their products."""
        self.loader.load(term.test.checkpoint)
        if self._takes_products(term, tokens, solves_tests):
            return self._held_terms(group, tokens)
        parts: list[Gradients] = []
        pieces = []
        first = 0
        for start, batch, part in group:
            batch = to_device(batch, self.sample.device)
            rows = []
            for found in tokens(batch, example_count(batch), part):
                examples = start + found.rows // found.length
                require_finite_features(found.gradients, examples, term.test.checkpoint)
                parts.append(found.gradients)
                rows.append(torch.stack([examples, found.rows % found.length]))
            if rows:
                examples, columns = torch.cat(rows, dim=1)
                pieces.append((first, examples, columns))
                first += len(columns)
        gradients = join_examples(parts)
        if solves_tests:
            solved = term.test.solved(gradients)
            return _Held(lambda train: train.inner(solved, self.total), pieces)
        return _Held(lambda train: gradients.inner(train, gradients.n).T, pieces)

    def _takes_products(self, term: Term, tokens: TokenSide, solves_tests: bool) -> bool:
        """Whether scores of terms are derivatives along training gradients."""
        is_exact = self.sample.dtype == next(iter(tokens.source.capture.parameters.values())).dtype
        same = term.test.checkpoint == term.train.checkpoint
        return (
            tokens.source.by == "term"
            and tokens.is_plain
            and same
            and is_exact
            and not solves_tests
        )

    def _held_terms(self, group: Sequence[Piece], tokens: TokenSide) -> _Held:
        made, pieces = [], []
        first = 0
        for start, batch, _ in group:
            batch = to_device(batch, self.sample.device)
            whole = tokens.whole(batch)  # checks the loss, too
            tokens.source.forget()
            examples = start + torch.arange(whole.n)
            require_finite_features(whole, examples, self.loader.current or 0)
            one = TermProducts(tokens, batch, tokens.factors(whole))
            rows = torch.arange(example_count(batch) * one.length)
            pieces.append((first, start + rows // one.length, rows % one.length))
            first += len(rows)
            made.append(one)
        return _Held(lambda train: torch.cat([one.along(train) for one in made]), pieces)

    def _of_tests_batch(
        self, numbers: Numbered, term: Term, held: _Held, solves_tests: bool
    ) -> Tensor:
        """The scores ``[rows, b]`` of the held tokens with one training batch."""
        indices, batch = numbers
        batch = to_device(batch, self.sample.device)
        train = term.train(batch)
        if not solves_tests:
            require_finite_features(train, indices, term.train.checkpoint, "training")
            train = term.test.solved(train)
        found = held.products(train)
        require_finite_scores(found, term, batch, indices)
        self.tick()
        return found

    def _pass_on_pieces(self, held: _Held, indices: Tensor, rows: Tensor) -> None:
        for first, examples, columns in held.pieces:
            start, token = int(examples.min()), int(columns.min())
            shape = int(examples.max()) - start + 1, len(indices), int(columns.max()) - token + 1
            values = rows.new_zeros(shape)
            own = rows[first : first + len(columns)]
            values[examples - start, :, columns - token] = own
            self._pass_on(torch.arange(start, start + shape[0]), indices, token, values)

    def _pass_on(self, queries: Tensor, indices: Tensor, first: int, values: Tensor) -> None:
        self.n = max(self.n, int(indices.max()) + 1)
        if self.weights is not None:
            weights = self.weights()
            values = values * weights[indices.to(weights.device)].to(values)[:, None]
        self.scores.add(Block(queries, indices, first, values))

    def _chunks(self, batches: Iterable[Numbered]) -> Iterator[list[Numbered]]:
        """This rank's batches; with several terms, as many as may be held at once."""
        chunk: list[Numbered] = []
        size = 0
        for number, (indices, batch) in enumerate(batches):
            self.n = max(self.n, int(indices.max()) + 1)
            if not is_mine(number):
                continue
            if chunk and (len(self.terms) == 1 or size + nbytes(batch) > CHUNK_BYTES):
                yield chunk
                chunk, size = [], 0
            chunk.append((indices, batch))
            size += nbytes(batch)
        if chunk:
            yield chunk


def _added(sums: list[Tensor], parts: list[Tensor]) -> list[Tensor]:
    """The sums of a chunk's batches with the parts of another term added."""
    return [a + b for a, b in zip(sums, parts, strict=True)] if sums else parts
