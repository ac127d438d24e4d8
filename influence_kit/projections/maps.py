"""Linear maps of vectors: their interface, and the maps that are not random.

Shapes: n vectors, p entries of each, k entries of their images; matrices of r rows and c columns
that are sums of t outer products.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn.functional import pad

from influence_kit.core.memory import rows_within, workspace_bytes


class VectorMap(ABC):
    """A linear map from vectors with p entries to vectors with k.

    Args:
        p: the number of entries of a vector.
        k: the number of entries of its image.
    """

    def __init__(self, p: int, k: int) -> None:
        self.p, self.k = p, k

    @abstractmethod
    def __call__(self, values: Tensor) -> Tensor:
        """The images ``[*, k]`` of vectors ``[*, p]``."""

    @abstractmethod
    def rows(self, indices: Tensor, like: Tensor) -> Tensor:
        """The images ``[u, k]`` of the unit vectors at some indices ``[u]``."""

    def of_outer(self, left: Tensor, right: Tensor) -> Tensor:
        """The images ``[n, k]`` of matrices, flattened by rows, that are sums of outer products.

        Args:
            left: the left factors, ``[n, t, r]``.
            right: the right factors, ``[n, t, c]``.
        """
        rows = rows_within(workspace_bytes(left.device), 2 * self.p * left.element_size())
        parts = zip(left.split(rows), right.split(rows), strict=True)
        return torch.cat([self(torch.bmm(a.transpose(1, 2), b).flatten(1)) for a, b in parts])

    def matrix(self, like: Tensor) -> Tensor:
        """The map written out, ``[p, k]``."""
        return self.rows(torch.arange(self.p, device=like.device), like)


class Identity(VectorMap):
    """The identity map."""

    def __init__(self, p: int) -> None:
        super().__init__(p, p)

    def __call__(self, values: Tensor) -> Tensor:
        return values

    def rows(self, indices: Tensor, like: Tensor) -> Tensor:
        return (indices[:, None] == torch.arange(self.p, device=indices.device)).to(like)


class Placed(VectorMap):
    """Puts a vector at its own range of k entries: a part of a concatenation.

    Args:
        p: the number of entries of a vector.
        k: the number of entries of the concatenation.
        start: the index at which this vector begins.
    """

    def __init__(self, p: int, k: int, start: int) -> None:
        super().__init__(p, k)
        self.start = start

    def __call__(self, values: Tensor) -> Tensor:
        return pad(values, (self.start, self.k - self.start - self.p))

    def rows(self, indices: Tensor, like: Tensor) -> Tensor:
        ours = indices[:, None] + self.start == torch.arange(self.k, device=indices.device)
        return ours.to(like)


class Coordinates(VectorMap):
    """A mask: some of the entries, times a number.

    Args:
        p: the number of entries of a vector.
        chosen: the indices of the entries, ascending ``[k]``.
        scale: the number; sqrt(p / k) preserves inner products in the mean if indices are random.
    """

    def __init__(self, p: int, chosen: Tensor, scale: float = 1.0) -> None:
        super().__init__(p, len(chosen))
        self.chosen, self.scale = chosen, scale

    def __call__(self, values: Tensor) -> Tensor:
        self.chosen = self.chosen.to(values.device)
        return values.index_select(-1, self.chosen).mul_(self.scale)

    def rows(self, indices: Tensor, like: Tensor) -> Tensor:
        same = indices[:, None] == self.chosen.to(indices.device)
        return same.to(like) * self.scale


class Composed(VectorMap):
    """One map after the other."""

    def __init__(self, first: VectorMap, second: VectorMap) -> None:
        super().__init__(first.p, second.k)
        self.first, self.second = first, second

    def __call__(self, values: Tensor) -> Tensor:
        return self.second(self.first(values))

    def rows(self, indices: Tensor, like: Tensor) -> Tensor:
        return self.second(self.first.rows(indices, like))
