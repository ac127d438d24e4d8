"""Random projections that preserve inner products in the mean, drawn from a seed and a name.

E<Mx, My> = <x, y> over the seeds. Every map is the same for any batch size, device and number of
ranks. It is made block by block: small maps are cached, others are drawn again at each use.

Shapes: n vectors, p entries of each, k entries of their images.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from influence_kit.core.arguments import shown
from influence_kit.core.draws import Draws, key_of
from influence_kit.core.memory import MIB, rows_within
from influence_kit.errors import InvalidArgumentError
from influence_kit.projections.maps import Coordinates, Identity, VectorMap
from influence_kit.projections.sjlt import SJLT

# the size of a block of a dense map, and the largest size of a map that is cached
BLOCK_BYTES, KEPT_BYTES = 4 * MIB, 256 * MIB


class DenseMap(VectorMap):
    """Independent entries of variance 1 / k: Gaussian, or signs (Rademacher).

    The inner product of two images has variance (|x|^2 |y|^2 + <x, y>^2) / k (Gaussian; slightly
    less for signs).

    Args:
        p: the number of entries of a vector.
        k: the number of entries of its image.
        key: the key of the random numbers, together with the kind.
        signs: True for Rademacher, False for Gaussian.
    """

    _kept: list[Tensor] | None = None

    def __init__(self, p: int, k: int, key: int, signs: bool) -> None:
        super().__init__(p, k)
        self.key, self.signs = key, signs
        self.step = rows_within(BLOCK_BYTES, 4 * k)

    def __call__(self, values: Tensor) -> Tensor:
        images = values.new_zeros(*values.shape[:-1], self.k)
        flat, total = values.reshape(-1, self.p), images.view(-1, self.k)
        for start, block in self._blocks(values):
            total.addmm_(flat[:, start : start + len(block)], block)
        return images

    def rows(self, indices: Tensor, like: Tensor) -> Tensor:
        found = like.new_empty(len(indices), self.k)
        for start, block in self._blocks(like):
            here = (indices >= start) & (indices < start + len(block))
            found[here] = block[indices[here] - start]
        return found

    def _blocks(self, like: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The blocks of the map's rows, with the index of their first row."""
        starts = range(0, self.p, self.step)
        kept = self._kept
        if kept is None or (kept[0].dtype, kept[0].device) != (like.dtype, like.device):
            drawn = (self._drawn(number, like) for number in range(len(starts)))
            if self.p * self.k * like.element_size() > KEPT_BYTES:
                yield from zip(starts, drawn, strict=True)
                return
            self._kept = kept = list(drawn)
        yield from zip(starts, kept, strict=True)

    def _drawn(self, number: int, like: Tensor) -> Tensor:
        """The block of rows from ``number * step`` on, which does not depend on other blocks."""
        shape = min(self.step, self.p - number * self.step), self.k
        draws = Draws(self.key, number)
        # normal numbers are drawn in float64, so that all precisions have the same map
        block = draws.bits(*shape).to(like).mul_(2).sub_(1) if self.signs else draws.normal(*shape)
        return block.mul_(self.k**-0.5).to(like)


class Orthogonal(VectorMap):
    """Random orthonormal columns times sqrt(p / k); k at most p.

    Args:
        p: the number of entries of a vector.
        k: the number of entries of its image.
        key: the key of the random numbers, together with the kind.
    """

    _cached: Tensor | None = None

    def __init__(self, p: int, k: int, key: int) -> None:
        super().__init__(p, k)
        self.key = key

    def __call__(self, values: Tensor) -> Tensor:
        return values @ self.matrix(values)

    def rows(self, indices: Tensor, like: Tensor) -> Tensor:
        return self.matrix(like)[indices]

    def matrix(self, like: Tensor) -> Tensor:
        known = self._cached
        if known is None or (known.dtype, known.device) != (like.dtype, like.device):
            self._cached = known = self._drawn.to(like)
        return known

    @cached_property
    def _drawn(self) -> Tensor:
        """The matrix in float64; other precisions are rounded from it."""
        basis, upper = torch.linalg.qr(Draws(self.key).normal(self.p, self.k))
        # with a positive diagonal, QR is unique and the directions are uniform
        columns: Tensor = basis * upper.diagonal().sign() * (self.p / self.k) ** 0.5
        return columns


def random_mask(p: int, k: int, key: int) -> Coordinates:
    """A mask of k entries drawn without replacement, times sqrt(p / k)."""
    chosen = Draws(key).order(p)[:k].sort().values
    return Coordinates(p, chosen, (p / k) ** 0.5)


KINDS = ("gaussian", "rademacher", "orthogonal", "sjlt", "mask", "identity")


def random_map(kind: str, p: int, k: int, *key: object, rows: int = 1) -> VectorMap:
    """A map from p entries to k, by its name.

    Args:
        kind: "gaussian", "rademacher", "orthogonal", "sjlt", "mask" or "identity" (then k is p).
        p: the number of entries of a vector.
        k: the number of entries of its image.
        key: the key of the random numbers: a seed and a name, say.
        rows: the number of rows, if the p entries are a matrix; 1 for a vector. Only "sjlt" uses
            it.

    Raises:
        InvalidArgumentError: for another kind.
    """
    seed = key_of(kind, *key)
    if kind == "identity":
        return Identity(p)
    if kind in ("gaussian", "rademacher"):
        return DenseMap(p, k, seed, signs=kind == "rademacher")
    if kind == "orthogonal":
        return Orthogonal(p, min(k, p), seed)
    if kind == "sjlt":
        return SJLT(rows, p // rows, k, seed)
    if kind == "mask":
        return random_mask(p, min(k, p), seed)
    raise InvalidArgumentError(f"`projection` must be one of {', '.join(KINDS)}; got {shown(kind)}")


def shortened(kind: str, p: int, k: int, *key: object, rows: int = 1) -> VectorMap:
    """The random map from p entries to k if k is smaller, else the identity."""
    return Identity(p) if p <= k else random_map(kind, p, k, *key, rows=rows)
