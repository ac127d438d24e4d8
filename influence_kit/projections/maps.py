"""Linear maps of vectors: what one is, and those that draw nothing.

Letters: n vectors, p entries of each, k entries of what they are mapped to; t products that make a
matrix, r and c its rows and columns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn.functional import pad

from influence_kit.core.memory import rows_within, workspace_bytes


class VectorMap(ABC):
    """A linear map of vectors with p entries to k.

    Args:
        p: entries of a vector.
        k: entries of its image.
    """

    def __init__(self, p: int, k: int) -> None:
        self.p, self.k = p, k

    @abstractmethod
    def __call__(self, values: Tensor) -> Tensor:
        """The images ``[*, k]`` of vectors ``[*, p]``."""

    @abstractmethod
    def rows(self, places: Tensor, like: Tensor) -> Tensor:
        """The images ``[u, k]`` of the unit vectors at some places ``[u]``."""

    def of_outer(self, left: Tensor, right: Tensor) -> Tensor:
        """The images ``[n, k]`` of matrices, row by row, that are sums of outer products.

        Args:
            left: the factors of the rows, ``[n, t, r]``.
            right: the factors of the columns, ``[n, t, c]``.
        """
        rows = rows_within(workspace_bytes(left.device), 2 * self.p * left.element_size())
        parts = zip(left.split(rows), right.split(rows), strict=True)
        return torch.cat([self(torch.bmm(a.transpose(1, 2), b).flatten(1)) for a, b in parts])

    def matrix(self, like: Tensor) -> Tensor:
        """The map written out, ``[p, k]``."""
        return self.rows(torch.arange(self.p, device=like.device), like)


class Identity(VectorMap):
    """Nothing is changed."""

    def __init__(self, p: int) -> None:
        super().__init__(p, p)

    def __call__(self, values: Tensor) -> Tensor:
        return values

    def rows(self, places: Tensor, like: Tensor) -> Tensor:
        return (places[:, None] == torch.arange(self.p, device=places.device)).to(like)


class Placed(VectorMap):
    """The entries in a row of their own among k: nothing is changed, for several vectors joined.

    Args:
        p: entries of a vector.
        k: entries of all vectors.
        start: where this one's begin.
    """

    def __init__(self, p: int, k: int, start: int) -> None:
        super().__init__(p, k)
        self.start = start

    def __call__(self, values: Tensor) -> Tensor:
        return pad(values, (self.start, self.k - self.start - self.p))

    def rows(self, places: Tensor, like: Tensor) -> Tensor:
        ours = places[:, None] + self.start == torch.arange(self.k, device=places.device)
        return ours.to(like)


class Coordinates(VectorMap):
    """Some of the entries, times a number: a mask.

    Args:
        p: entries of a vector.
        chosen: the places of the entries, ascending ``[k]``.
        scale: the number; sqrt(p / k) keeps inner products where the places are random.
    """

    def __init__(self, p: int, chosen: Tensor, scale: float = 1.0) -> None:
        super().__init__(p, len(chosen))
        self.chosen, self.scale = chosen, scale

    def __call__(self, values: Tensor) -> Tensor:
        self.chosen = self.chosen.to(values.device)
        return values.index_select(-1, self.chosen).mul_(self.scale)

    def rows(self, places: Tensor, like: Tensor) -> Tensor:
        same = places[:, None] == self.chosen.to(places.device)
        return same.to(like) * self.scale


class Composed(VectorMap):
    """One map after the other."""

    def __init__(self, first: VectorMap, second: VectorMap) -> None:
        super().__init__(first.p, second.k)
        self.first, self.second = first, second

    def __call__(self, values: Tensor) -> Tensor:
        return self.second(self.first(values))

    def rows(self, places: Tensor, like: Tensor) -> Tensor:
        return self.second(self.first.rows(places, like))
