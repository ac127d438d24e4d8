"""Reducers: which of the scores of a pass are kept, all of them or the k highest or lowest.

Shapes: m test examples, n training examples, b test examples of a block.

A block is ``(indices [n], scores [*, m, n])``: the scores of m test examples with the training
examples of those indices. If a score depends on all training examples, it is ``(indices [b],
scores [b, n])``: the scores of the test examples of those indices with all training examples. Each
rank reduces its own blocks; ``result`` merges the ranks.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from influence_kit.core.distributed import gather_columns, is_alone


class KMostInfluentialResults(NamedTuple):
    """The k training examples with the highest (or lowest) scores for each of m test examples.

    Attributes:
        indices: indices in the training set, int64 ``[m, k]``, best first.
        influence_scores: their scores ``[m, k]``: descending for proponents, ascending for
            opponents, each with its own sign.
    """

    indices: Tensor
    influence_scores: Tensor


class Reducer(Protocol):
    """Takes blocks one after the other, in ascending order of indices."""

    keeps_all: bool

    def update(self, indices: Tensor, block: Tensor) -> None:
        """Add a block."""

    def result(self) -> Tensor | KMostInfluentialResults:
        """The scores that are kept from the blocks of all ranks."""


class Weighted:
    """Multiplies each training example's scores by its weight, and passes them to a reducer.

    Args:
        reducer: the reducer.
        weights: returns the weights ``[n]``, which may not be known before the first block.
    """

    def __init__(self, reducer: Reducer, weights: Callable[[], Tensor]) -> None:
        self.keeps_all = reducer.keeps_all
        self._reducer, self._weights = reducer, weights

    def update(self, indices: Tensor, block: Tensor) -> None:
        """Add a block."""
        weights = self._weights()
        self._reducer.update(indices, block * weights[indices.to(weights.device)].to(block))

    def result(self) -> Tensor | KMostInfluentialResults:
        """The result of the other reducer."""
        return self._reducer.result()


class Shifted:
    """Subtracts a number of each training example from its scores, for a reducer.

    Args:
        reducer: the reducer.
        shift: the numbers ``[n]``.
    """

    def __init__(self, reducer: Reducer, shift: Tensor) -> None:
        self.keeps_all = reducer.keeps_all
        self._reducer, self._shift = reducer, shift

    def update(self, indices: Tensor, block: Tensor) -> None:
        """Add a block."""
        self._reducer.update(indices, block - self._shift[indices.to(self._shift.device)].to(block))

    def result(self) -> Tensor | KMostInfluentialResults:
        """The result of the other reducer."""
        return self._reducer.result()


class AllScores:
    """All scores, ``[*, m, n]`` in the order of the training set.

    Args:
        dim: the dimension along which blocks are joined: that of training examples, or 0.
    """

    keeps_all = True

    def __init__(self, dim: int = -1) -> None:
        self._dim = dim
        self._indices: list[Tensor] = []
        self._blocks: list[Tensor] = []

    def update(self, indices: Tensor, block: Tensor) -> None:
        """Add a block."""
        self._indices.append(indices)
        self._blocks.append(block)

    def result(self) -> Tensor:
        """All blocks, one after the other."""
        blocks = self._blocks
        scores = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=self._dim)
        if is_alone():
            return scores
        indices = gather_columns(torch.cat(self._indices).to(scores.device))
        gathered = gather_columns(scores.movedim(self._dim, -1))
        return gathered[..., torch.argsort(indices)].movedim(-1, self._dim)


class TopK:
    """The k highest scores (or the lowest) of each test example; of equal scores the first indices.

    Memory is ``m * k``, for any number of training examples.
    """

    keeps_all = False

    def __init__(self, k: int, proponents: bool) -> None:
        self._k, self._highest = k, proponents
        self._scores: Tensor | None = None
        self._indices: Tensor | None = None

    def update(self, indices: Tensor, block: Tensor) -> None:
        """Add a block."""
        # reduce the block first, so that nothing of its size is copied
        columns = self._best_columns(block)
        scores, best = block.gather(1, columns), indices.to(block.device)[columns]
        if self._scores is not None and self._indices is not None:
            scores = torch.cat([self._scores, scores], dim=1)
            best = torch.cat([self._indices, best], dim=1)
        self._keep(scores, best)

    def _keep(self, scores: Tensor, indices: Tensor) -> None:
        """Keep the k best columns of each row in order of their (ascending) indices."""
        columns = self._best_columns(scores)
        self._scores, self._indices = scores.gather(1, columns), indices.gather(1, columns)

    def _best_columns(self, scores: Tensor) -> Tensor:
        """The columns ``[m, k]`` of each row's k best, ascending; the first of equal scores."""
        k = min(self._k, scores.shape[1])
        found = scores.topk(k, dim=1, largest=self._highest)
        if k == 0:
            return found.indices
        # topk may take any of the scores that equal the last one
        last = found.values[:, -1:]
        tied = ((scores == last).sum(1) > (found.values == last).sum(1)).nonzero()[:, 0]
        if len(tied):
            ordered = scores[tied].argsort(dim=1, descending=self._highest, stable=True)
            found.indices[tied] = ordered[:, :k]
        return found.indices.sort(dim=1).values

    def result(self) -> KMostInfluentialResults:
        """The k best of all ranks, best first."""
        assert self._scores is not None
        assert self._indices is not None
        scores, indices = gather_columns(self._scores), gather_columns(self._indices)
        by_index = indices.argsort(dim=1)
        self._keep(scores.gather(1, by_index), indices.gather(1, by_index))
        return self.local_result()

    def local_result(self) -> KMostInfluentialResults:
        """The k best of this rank's blocks, best first."""
        assert self._scores is not None
        assert self._indices is not None
        order = self._scores.argsort(dim=1, descending=self._highest, stable=True)
        indices, scores = self._indices.gather(1, order), self._scores.gather(1, order)
        return KMostInfluentialResults(indices, scores)


class WholeRows:
    """All scores, or the k highest (or lowest), of blocks that are whole rows.

    Args:
        k: how many scores to keep of each row; None for all.
        proponents: True for the highest scores, False for the lowest.
    """

    def __init__(self, k: int | None, proponents: bool) -> None:
        self.keeps_all = k is None
        self._k, self._highest = k, proponents
        # for the k best: their indices and their scores
        self._kept = [AllScores(dim=0) for _ in range(1 if k is None else 2)]

    def update(self, indices: Tensor, block: Tensor) -> None:
        """Add the scores ``[b, n]`` of the test examples of these indices."""
        parts: tuple[Tensor, ...] = (block,)
        if self._k is not None:
            best = TopK(self._k, self._highest)
            best.update(torch.arange(block.shape[1]), block)
            parts = best.local_result()
        for kept, part in zip(self._kept, parts, strict=True):
            kept.update(indices, part)

    def result(self) -> Tensor | KMostInfluentialResults:
        """The rows of all ranks, in the order of the test examples."""
        found = [kept.result() for kept in self._kept]
        return found[0] if self._k is None else KMostInfluentialResults(*found)
