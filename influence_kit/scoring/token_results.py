"""What is kept of token scores: all of them, those of some pairs, or their sums by document.

Shapes: m test examples, n training examples, k training examples per test example, t tokens (of the
longest example; scores beyond a shorter one's tokens are 0), D documents.

A block is the scores ``[q, b, s]`` of q test examples with b training examples, of the s tokens
that begin at some index. Each rank adds its own blocks; ``result`` merges the ranks.
"""

from collections.abc import Sequence
from typing import NamedTuple, NoReturn, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from influence_kit.core.distributed import gather_columns, sum_over_ranks
from influence_kit.core.memory import MIB, free_bytes
from influence_kit.errors import InvalidArgumentError


class KMostInfluentialTokens(NamedTuple):
    """The k best training examples for each of m test examples, with the scores of tokens.

    Attributes:
        indices: indices in the training set, int64 ``[m, k]``, best first.
        influence_scores: the scores of the pairs ``[m, k]``, as in ``KMostInfluentialResults``.
        token_scores: their parts ``[m, k, t]``, by token of the training example (or of the test
            example); they sum to ``influence_scores`` over t.
    """

    indices: Tensor
    influence_scores: Tensor
    token_scores: Tensor


class Block(NamedTuple):
    """Scores of some tokens.

    Attributes:
        queries: the indices of the test examples ``[q]``.
        indices: the indices of the training examples ``[b]``.
        first: the index of the first token.
        values: the scores ``[q, b, s]``.
    """

    queries: Tensor
    indices: Tensor
    first: int
    values: Tensor


class TokenScores(Protocol):
    """Takes blocks, in any order."""

    def add(self, block: Block) -> None:
        """Add a block."""

    def result(self, m: int, n: int) -> Tensor:
        """What is kept of the blocks of all ranks, for so many test and training examples."""


class AllTokens:
    """All scores, ``[m, n, t]``.

    Args:
        sample: a tensor with the dtype and device of the scores.
        m: the number of test examples, 0 if unknown.
        n: the number of training examples, 0 if unknown.
    """

    def __init__(self, sample: Tensor, m: int, n: int) -> None:
        self._sample, self._m, self._n = sample, m, n
        # they are held twice when they are put together
        self._budget = max(64 * MIB, free_bytes(sample.device)) // 2
        self._blocks: list[Block] = []
        self._held = 0

    def add(self, block: Block) -> None:
        """Add a block."""
        values = block.values
        count = block.first + values.shape[2]
        self._held += values.numel()
        needed = max(self._held, self._m * self._n * count) * values.element_size()
        if needed > self._budget:
            self._refuse(count, needed)
        self._blocks.append(block)

    def _refuse(self, count: int, needed: int) -> NoReturn:
        shape = f"[{self._m or 'm'}, {self._n or 'n'}, {count}]"
        raise InvalidArgumentError(
            f"the scores of all tokens {shape} take {needed / MIB:.0f} MiB, and there is room for "
            f"{self._budget / MIB:.0f} MiB: pass `k`, for the token scores of the k best training "
            "examples of each test example, or fewer test examples"
        )

    def result(self, m: int, n: int) -> Tensor:
        """All scores."""
        count = _of_all_ranks(
            max((b.first + b.values.shape[2] for b in self._blocks), default=0), self._sample
        )
        scores = self._sample.new_zeros(m, n, count)
        for queries, indices, first, values in self._blocks:
            columns = torch.arange(first, first + values.shape[2])
            scores[queries[:, None, None], indices[:, None], columns] = values
        return sum_over_ranks(scores)


class PairTokens:
    """The scores of some pairs, ``[m, k, t]``.

    Args:
        pairs: the training examples of each test example, ``[m, k]``.
        sample: a tensor with the dtype and device of the scores.
    """

    def __init__(self, pairs: Tensor, sample: Tensor) -> None:
        self._pairs = pairs.cpu()
        self._scores = sample.new_zeros(*pairs.shape, 0)

    def add(self, block: Block) -> None:
        """Add a block."""
        count = block.first + block.values.shape[2]
        self._widen(count)
        found = (self._pairs[block.queries][..., None] == block.indices).nonzero()
        row, column, train = found.unbind(1)
        self._scores[block.queries[row], column, block.first : count] = block.values[row, train]

    def _widen(self, count: int) -> None:
        if count > self._scores.shape[2]:
            self._scores = pad(self._scores, (0, count - self._scores.shape[2]))

    def result(self, m: int, n: int) -> Tensor:
        """The scores of the pairs."""
        self._widen(_of_all_ranks(self._scores.shape[2], self._scores))
        return sum_over_ranks(self._scores)


class DocumentSums:
    """The scores of training tokens, summed by document: ``[m, D]``.

    Args:
        documents: the documents of each training example's tokens, ``[t]`` each; negative for
            tokens of none.
        sample: a tensor with the dtype and device of the scores.
    """

    def __init__(self, documents: Sequence[Tensor], sample: Tensor) -> None:
        self._documents = documents
        self._count = 1 + max((int(ids.max()) for ids in documents if len(ids)), default=-1)
        self._sample = sample
        self._sums = sample.new_zeros(0, self._count)

    def add(self, block: Block) -> None:
        """Add a block."""
        if len(block.queries) > len(self._sums):
            self._require_room(len(block.queries))
            self._sums = pad(self._sums, (0, 0, 0, len(block.queries) - len(self._sums)))
        t = block.values.shape[2]
        for column, index in enumerate(block.indices.tolist()):
            ids = self._documents_of(index, t)
            counts = ids >= 0
            values = block.values[:, column, : len(ids)]
            self._sums.index_add_(1, ids[counts], values[:, counts.to(values.device)])

    def _require_room(self, m: int) -> None:
        needed = m * self._count * self._sample.element_size()
        budget = max(64 * MIB, free_bytes(self._sample.device)) // 2
        if needed > budget:
            raise InvalidArgumentError(
                f"`doc_ids` holds {self._count - 1}, so that scores [{m}, {self._count}] take "
                f"{needed / MIB:.0f} MiB, and there is room for {budget / MIB:.0f} MiB: number the "
                "documents from 0 without gaps"
            )

    def _documents_of(self, index: int, t: int) -> Tensor:
        if index >= len(self._documents):
            raise InvalidArgumentError(
                f"`doc_ids` has {len(self._documents)} rows, and the training set has more "
                "examples; there must be one row per training example"
            )
        ids = self._documents[index]
        if bool((ids[t:] >= 0).any()):
            raise InvalidArgumentError(
                f"`doc_ids` has {len(ids)} tokens for training example {index}, which has {t} "
                "positions in its batch; tokens that are not in the batch must be -1"
            )
        return ids[:t].to(self._sample.device)

    def result(self, m: int, n: int) -> Tensor:
        """The sums."""
        if n != len(self._documents):
            raise InvalidArgumentError(
                f"`doc_ids` has {len(self._documents)} rows for {n} training examples; there must "
                "be one row per training example"
            )
        return sum_over_ranks(pad(self._sums, (0, 0, 0, m - len(self._sums))))


def _of_all_ranks(count: int, sample: Tensor) -> int:
    """The largest number of any rank."""
    return int(gather_columns(torch.tensor([count], device=sample.device)).max())
