"""What is kept of the blocks of scores as they come: all of them, or the k highest or lowest.

A block is ``(places [n], scores [*, m, n])``: the scores of m test examples with the training
examples at those places. Each rank reduces its own blocks; ``result`` merges the ranks.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from influence_kit.distributed import gather_columns


class KMostInfluentialResults(NamedTuple):
    """The k training examples with the highest (or lowest) scores for each of m test examples.

    Attributes:
        indices: places in the training set, int64 ``[m, k]``, best first.
        influence_scores: their scores ``[m, k]``: descending for proponents, ascending for
            opponents, each with its own sign.
    """

    indices: Tensor
    influence_scores: Tensor


class Reducer(Protocol):
    """Takes blocks one after the other, in ascending order of places."""

    keeps_all: bool

    def update(self, places: Tensor, block: Tensor) -> None:
        """Take a block."""


class AllScores:
    """All scores, ``[*, m, n]`` in the order of the training set."""

    keeps_all = True

    def __init__(self) -> None:
        self._places: list[Tensor] = []
        self._blocks: list[Tensor] = []

    def update(self, places: Tensor, block: Tensor) -> None:
        """Take a block."""
        self._places.append(places)
        self._blocks.append(block)

    def result(self) -> Tensor:
        """All blocks, side by side."""
        scores = self._blocks[0] if len(self._blocks) == 1 else torch.cat(self._blocks, dim=-1)
        places = torch.cat(self._places).to(scores.device)
        gathered = gather_columns(places)
        if len(gathered) == len(places):
            return scores
        return gather_columns(scores)[..., torch.argsort(gathered)]


class TopK:
    """The k highest scores (or the lowest) of each test example; of equal scores the first places.

    Memory is ``m * k``, whatever the number of training examples.
    """

    keeps_all = False

    def __init__(self, k: int, proponents: bool) -> None:
        self._k, self._sign = k, 1 if proponents else -1
        self._scores: Tensor | None = None
        self._places: Tensor | None = None

    def update(self, places: Tensor, block: Tensor) -> None:
        """Take a block."""
        spread = places.to(block.device).expand(block.shape)
        if self._scores is not None and self._places is not None:
            block = torch.cat([self._scores, block], dim=1)
            spread = torch.cat([self._places, spread], dim=1)
        self._keep(block, spread)

    def _keep(self, scores: Tensor, places: Tensor) -> None:
        """Keep the k best columns of each row, in ascending order of places (as they come in)."""
        columns = self._best_columns(scores * self._sign).sort(dim=1).values
        self._scores, self._places = scores.gather(1, columns), places.gather(1, columns)

    def _best_columns(self, keys: Tensor) -> Tensor:
        k = min(self._k, keys.shape[1])
        found = keys.topk(k, dim=1)
        if k == 0:
            return found.indices
        # topk takes any of the scores that equal the last one; take the first places
        last = found.values[:, -1:]
        tied = ((keys == last).sum(1) > (found.values == last).sum(1)).nonzero()[:, 0]
        if len(tied):
            ordered = keys[tied].argsort(dim=1, descending=True, stable=True)
            found.indices[tied] = ordered[:, :k]
        return found.indices

    def result(self) -> KMostInfluentialResults:
        """The k best of all ranks, best first."""
        assert self._scores is not None
        assert self._places is not None
        scores, places = gather_columns(self._scores), gather_columns(self._places)
        by_place = places.argsort(dim=1)
        self._keep(scores.gather(1, by_place), places.gather(1, by_place))
        return self.local_result()

    def local_result(self) -> KMostInfluentialResults:
        """The k best of this rank's blocks, best first."""
        assert self._scores is not None
        assert self._places is not None
        order = (self._scores * self._sign).argsort(dim=1, descending=True, stable=True)
        return KMostInfluentialResults(self._places.gather(1, order), self._scores.gather(1, order))
