"""The only loops over data: from terms, test inputs and a training set to blocks of scores.

Shapes: m test examples, n training examples, P parameters.

The training set is read once, in chunks of batches. Within a chunk each term's checkpoint is loaded
once; the test gradients of a term are computed once and kept. So a method with c checkpoints does
c loads per chunk, however many batches there are, and holds one chunk of data, one block of scores
``[m, chunk]``, and the test gradients.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from influence_kit.checkpoints.loader import CheckpointLoader
from influence_kit.core.distributed import is_mine
from influence_kit.core.memory import MIB, rows_within
from influence_kit.data.batches import Batch, example_count, nbytes, to_device
from influence_kit.errors import InvalidArgumentError, NonFiniteError
from influence_kit.gradients.per_example import Gradients
from influence_kit.scoring.reducers import Reducer
from influence_kit.scoring.side_gradients import (
    SideGradients,
    errors_named,
    refuse_non_finite_examples,
)
from influence_kit.scoring.term import Term
from influence_kit.scoring.watch import Watch

# the size of a chunk of raw data, and of a block of scores that is reduced and dropped
CHUNK_BYTES = 256 * MIB
BLOCK_BYTES = 2 * MIB
# with fewer rows, a chunk has too little work between two loads of a checkpoint
FEWEST_CHUNK_ROWS = 1024

# batches with the index of the first example of each
Chunk = list[tuple[int, Batch]]


def _nothing() -> None:
    """The ``tick`` of a pass that shows no progress."""


@dataclass
class Stream:
    """One pass of a method over its training set.

    Args:
        terms: the terms of the method.
        loader: loads checkpoints into the model.
        sample: a tensor with the dtype and device of the scores.
        total: the number of training examples, 0 if unknown.
        groups: names of parameters by group, to split the scores by; None for whole scores.
        tick: called after each training batch of each term.
        watch: observes ``scores`` while it computes the first term.
    """

    terms: Sequence[Term]
    loader: CheckpointLoader
    sample: Tensor
    total: int = 0
    groups: Mapping[str, Sequence[str]] | None = None
    tick: Callable[[], None] = field(default=_nothing)
    watch: Watch | None = None

    @property
    def sides(self) -> SideGradients:
        """Computes the gradients of the terms' sides."""
        return SideGradients(self.loader, self.sample)

    def scores(
        self, inputs: Iterable[Batch], train: Iterable[Batch], reducer: Reducer, aggregate: bool
    ) -> None:
        """Pass the scores of all test and training examples to the reducer."""
        kept = {0: self.sides.of(self.terms[0].test, inputs, aggregate, self.watch)}
        m = kept[0].n
        rows = None if reducer.keeps_all else _block_rows(kept[0])
        empty = True
        for chunk, is_last in chunks(train, rows, batches=1 if len(self.terms) == 1 else None):
            indices, columns = _columns(chunk)
            block = self._empty_block(m, len(indices))
            for number, term in enumerate(self.terms):
                test = kept.pop(number, None) or self.sides.of(term.test, inputs, aggregate)
                if number == 0 or not is_last:
                    kept[number] = test
                self._add(block, columns, chunk, term, test)
            reducer.update(indices, block)
            empty = False
        if empty:
            reducer.update(torch.arange(0), self._empty_block(m, 0))
        if self.watch is not None:
            self.watch.finish()

    def _empty_block(self, m: int, n: int) -> Tensor:
        leading = () if self.groups is None else (len(self.groups),)
        return self.sample.new_zeros(*leading, m, n)

    def _add(
        self, block: Tensor, columns: list[slice], chunk: Chunk, term: Term, test: Gradients
    ) -> None:
        """Add a term's scores for one chunk to the block."""
        weight = term.weight_at(self.loader.load(term.train.checkpoint))
        for (start, batch), rows in zip(chunk, columns, strict=True):
            train = self.sides.batch(term.train, batch, start, "training")
            if self.groups is None:
                part = train.inner(test, self.total)
            else:
                part = train.inner_by_group(test, self.total, self.groups)
            if not torch.isfinite(part.sum()):
                _refuse_non_finite(part, test, train, start, term.train.checkpoint)
            if self.watch is not None and term is self.terms[0]:
                self.watch.see_scores(train, part if self.groups is None else part.sum(0))
            block[..., rows].add_(part, alpha=weight)
            self.tick()

    def self_scores(self, batches: Iterable[Batch], reducer: Reducer) -> None:
        """Pass each example's score with itself, ``[n]``, to the reducer."""
        empty = True
        for chunk, _ in chunks(batches, None, batches=1 if len(self.terms) == 1 else None):
            indices, columns = _columns(chunk)
            scores = self.sample.new_zeros(len(indices))
            for term in self.terms:
                weight = term.weight_at(self.loader.load(term.train.checkpoint))
                for (start, batch), rows in zip(chunk, columns, strict=True):
                    batch = to_device(batch, self.sample.device)
                    with errors_named(term.train, batch, start, "training"):
                        train, part = term.self_products(batch)
                    if not torch.isfinite(part.sum()):
                        _refuse_non_finite(part, train, train, start, term.train.checkpoint)
                    scores[rows].add_(part, alpha=weight)
                    self.tick()
            reducer.update(indices, scores)
            empty = False
        if empty:  # all batches went to other ranks
            reducer.update(torch.arange(0), self.sample.new_zeros(0))


def chunks(
    source: Iterable[Batch], rows: int | None, batches: int | None
) -> Iterator[tuple[Chunk, bool]]:
    """Chunks of this rank's batches, and whether each is the last; see ``Chunk``.

    Args:
        source: batches, read once.
        rows: the most examples in a chunk (one batch may hold more); None for any number.
        batches: the most batches in a chunk; None for any number.
    """
    chunk: Chunk = []
    held = size = start = 0
    for number, batch in enumerate(source):
        n = example_count(batch)
        if is_mine(number):
            full = (rows is not None and held + n > rows) or size + nbytes(batch) > CHUNK_BYTES
            if chunk and (full or len(chunk) == batches):
                yield chunk, False
                chunk, held, size = [], 0, 0
            chunk.append((start, batch))
            held, size = held + n, size + nbytes(batch)
        start += n
    if start == 0:
        raise InvalidArgumentError("there are no examples: the data set or loader is empty")
    if chunk:
        yield chunk, True


def _columns(chunk: Chunk) -> tuple[Tensor, list[slice]]:
    """The indices of a chunk's examples in the training set, and each batch's columns."""
    counts = [example_count(batch) for _, batch in chunk]
    indices = [torch.arange(start, start + n) for (start, _), n in zip(chunk, counts, strict=True)]
    ends = torch.tensor(counts).cumsum(0).tolist()
    columns = [slice(end - n, end) for end, n in zip(ends, counts, strict=True)]
    return torch.cat(indices), columns


def _block_rows(test: Gradients) -> int:
    """The most training examples in a block of scores that is not kept."""
    budget = BLOCK_BYTES // test.sample.element_size()
    return max(FEWEST_CHUNK_ROWS, rows_within(budget, test.n))


def _refuse_non_finite(
    part: Tensor, test: Gradients, train: Gradients, start: int, checkpoint: int
) -> None:
    """Raise an error that names the examples and layer of a score that is NaN or infinite."""
    bad = torch.nonzero(~torch.isfinite(part))
    if not len(bad):  # finite scores whose sum overflows
        return
    *_, row, column = (0, *bad[0].tolist())
    refuse_non_finite_examples(train, start, "training", checkpoint)
    refuse_non_finite_examples(test, 0, "test", checkpoint)
    raise NonFiniteError(
        f"the score of test example {row} with training example {start + column} overflows at "
        f"checkpoint {checkpoint}, though all gradients are finite; use float64"
    )
