"""Linear maps that shorten vectors and keep their inner products, drawn from a seed and a name.

Every map is the same for any batch size, device and number of ranks, and is made block by block:
blocks are kept while they are small together, and otherwise drawn again at each use.

Letters: n vectors, p entries of each, k entries of what they are mapped to.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from influence_kit.errors import InvalidArgumentError
from influence_kit.memory import MIB, rows_within

# a block of a dense map, and what all blocks of a map may take to be kept
BLOCK_BYTES, KEPT_BYTES = 4 * MIB, 256 * MIB


def key_of(*parts: object) -> int:
    """A seed of 63 bits for whatever the parts tell apart."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class RandomMap(ABC):
    """A linear map of vectors with p entries to k, with E<Mx, My> = <x, y> over its seeds.

    Args:
        p: entries of a vector.
        k: entries of its image.
        key: what the map is drawn from, with its kind.
    """

    def __init__(self, p: int, k: int, key: int) -> None:
        self.p, self.k, self.key = p, k, key

    @abstractmethod
    def __call__(self, values: Tensor) -> Tensor:
        """The images ``[*, k]`` of vectors ``[*, p]``."""

    @abstractmethod
    def rows(self, places: Tensor, like: Tensor) -> Tensor:
        """The images ``[u, k]`` of the unit vectors at some places ``[u]``."""

    def matrix(self, like: Tensor) -> Tensor:
        """The map written out, ``[p, k]``."""
        return self.rows(torch.arange(self.p, device=like.device), like)


class Identity(RandomMap):
    """Nothing is changed."""

    def __init__(self, p: int) -> None:
        super().__init__(p, p, 0)

    def __call__(self, values: Tensor) -> Tensor:
        return values

    def rows(self, places: Tensor, like: Tensor) -> Tensor:
        return (places[:, None] == torch.arange(self.p, device=places.device)).to(like)


class Placed(RandomMap):
    """The entries in a row of their own among k: nothing is changed, for several vectors joined.

    Args:
        p: entries of a vector.
        k: entries of all vectors.
        start: where this one's begin.
    """

    def __init__(self, p: int, k: int, start: int) -> None:
        super().__init__(p, k, 0)
        self.start = start

    def __call__(self, values: Tensor) -> Tensor:
        return torch.nn.functional.pad(values, (self.start, self.k - self.start - self.p))

    def rows(self, places: Tensor, like: Tensor) -> Tensor:
        ours = places[:, None] + self.start == torch.arange(self.k, device=places.device)
        return ours.to(like)


class Blocked(RandomMap):
    """A map that is drawn in blocks of entries, each from a seed of its own."""

    # entries of a block
    step: int
    _kept: list[tuple[Tensor, ...]] | None = None

    @abstractmethod
    def draw(self, number: int, like: Tensor) -> tuple[Tensor, ...]:
        """The block of the entries from ``number * step``."""

    def blocks(self, like: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """All blocks, in order."""
        numbers = range(-(-self.p // self.step))
        kept = self._kept
        if kept is None or (kept[0][-1].dtype, kept[0][-1].device) != (like.dtype, like.device):
            first = self.draw(0, like)
            if len(numbers) * sum(part.nbytes for part in first) > KEPT_BYTES:
                yield first
                yield from (self.draw(number, like) for number in numbers[1:])
                return
            self._kept = kept = [first, *(self.draw(number, like) for number in numbers[1:])]
        yield from kept


class DenseMap(Blocked):
    """Independent entries of variance 1 / k: Gaussian, or signs (Rademacher).

    Of two vectors the inner product has variance (|x|^2 |y|^2 + <x, y>^2) / k (Gaussian; signs
    have a little less).
    """

    def __init__(self, p: int, k: int, key: int, signs: bool) -> None:
        super().__init__(p, k, key)
        self.signs = signs
        self.step = rows_within(BLOCK_BYTES, 4 * k)

    def __call__(self, values: Tensor) -> Tensor:
        images = values.new_zeros(*values.shape[:-1], self.k)
        flat, total = values.reshape(-1, self.p), images.view(-1, self.k)
        for start, (block,) in self._placed(values):
            total.addmm_(flat[:, start : start + len(block)], block)
        return images

    def rows(self, places: Tensor, like: Tensor) -> Tensor:
        found = like.new_empty(len(places), self.k)
        for start, (block,) in self._placed(like):
            here = (places >= start) & (places < start + len(block))
            found[here] = block[places[here] - start]
        return found

    def _placed(self, like: Tensor) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
        return zip(range(0, self.p, self.step), self.blocks(like), strict=True)

    def draw(self, number: int, like: Tensor) -> tuple[Tensor, ...]:
        shape = min(self.step, self.p - number * self.step), self.k
        key = key_of(self.key, number)
        if self.signs:
            count = shape[0] * shape[1]
            drawn = np.random.Generator(np.random.Philox(key)).bytes(-(-count // 8))
            bits = np.unpackbits(np.frombuffer(drawn, np.uint8), count=count)
            block = torch.from_numpy(bits).view(shape).to(like).mul_(2).sub_(1)
        else:
            generator = torch.Generator().manual_seed(key)
            # drawn in one precision, so that models of both have the same map
            block = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (block.mul_(self.k**-0.5).to(like),)


class Orthogonal(RandomMap):
    """Orthonormal columns in a random direction, times sqrt(p / k); k at most p."""

    _at_hand: Tensor | None = None

    def __call__(self, values: Tensor) -> Tensor:
        return values @ self.matrix(values)

    def rows(self, places: Tensor, like: Tensor) -> Tensor:
        return self.matrix(like)[places]

    def matrix(self, like: Tensor) -> Tensor:
        known = self._at_hand
        if known is None or (known.dtype, known.device) != (like.dtype, like.device):
            self._at_hand = known = self._drawn.to(like)
        return known

    @cached_property
    def _drawn(self) -> Tensor:
        """The matrix in float64, of which another precision is rounded."""
        generator = torch.Generator().manual_seed(self.key)
        drawn = torch.randn(self.p, self.k, generator=generator, dtype=torch.float64)
        basis, upper = torch.linalg.qr(drawn)
        # QR is unique, and the direction uniform, with a positive diagonal
        columns: Tensor = basis * upper.diagonal().sign() * (self.p / self.k) ** 0.5
        return columns


class Coordinates(RandomMap):
    """Some of the entries, times a number: a mask.

    Args:
        p: entries of a vector.
        chosen: the places of the entries, ascending ``[k]``.
        scale: the number; sqrt(p / k) keeps inner products where the places are random.
    """

    def __init__(self, p: int, chosen: Tensor, scale: float = 1.0) -> None:
        super().__init__(p, len(chosen), 0)
        self.chosen, self.scale = chosen, scale

    @staticmethod
    def random(p: int, k: int, key: int) -> Coordinates:
        """Entries drawn without replacement."""
        generator = torch.Generator().manual_seed(key)
        chosen = torch.randperm(p, generator=generator)[:k].sort().values
        return Coordinates(p, chosen, (p / k) ** 0.5)

    def __call__(self, values: Tensor) -> Tensor:
        self.chosen = self.chosen.to(values.device)
        return values.index_select(-1, self.chosen).mul_(self.scale)

    def rows(self, places: Tensor, like: Tensor) -> Tensor:
        same = places[:, None] == self.chosen.to(places.device)
        return same.to(like) * self.scale


class SJLT(Blocked):
    """The sparse Johnson-Lindenstrauss transform: each entry is added to one of k, with a sign.

    k entries that follow one another go to different places (a random permutation of them), so
    that a block of entries is added in one go. Inner products have variance at most
    (|x|^2 |y|^2 + <x, y>^2) / k, as with independent places.
    """

    def __init__(self, p: int, k: int, key: int) -> None:
        super().__init__(p, k, key)
        self.step = k

    def __call__(self, values: Tensor) -> Tensor:
        flat = values.reshape(-1, self.p)
        images = values.new_zeros(len(flat), self.k)
        for start, (source, signs) in zip(
            range(0, self.p, self.k), self.blocks(values), strict=True
        ):
            block = flat[:, start : start + self.k]
            if block.shape[1] == self.k:
                # place j takes entry source[j]
                images.addcmul_(block.index_select(1, source), signs)
            else:
                # of a permutation, the places of the entries that are there
                there = (source < block.shape[1]).nonzero()[:, 0]
                images[:, there] += block[:, source[there]] * signs[there]
        return images.view(*values.shape[:-1], self.k)

    def rows(self, places: Tensor, like: Tensor) -> Tensor:
        found = like.new_zeros(len(places), self.k)
        for number, (source, signs) in enumerate(self.blocks(like)):
            here = (places // self.k == number).nonzero()[:, 0]
            target = torch.argsort(source)[places[here] % self.k]
            found[here, target] = signs[target]
        return found

    def draw(self, number: int, like: Tensor) -> tuple[Tensor, ...]:
        """For each of the k places the entry of the block that comes there, and its sign."""
        generator = torch.Generator().manual_seed(key_of(self.key, number))
        source = torch.randperm(self.k, generator=generator)
        signs = torch.randint(0, 2, (self.k,), generator=generator)
        return source.to(like.device), signs.to(like).mul_(2).sub_(1)


class Composed(RandomMap):
    """One map after the other."""

    def __init__(self, first: RandomMap, second: RandomMap) -> None:
        super().__init__(first.p, second.k, 0)
        self.first, self.second = first, second

    def __call__(self, values: Tensor) -> Tensor:
        return self.second(self.first(values))

    def rows(self, places: Tensor, like: Tensor) -> Tensor:
        return self.second(self.first.rows(places, like))


KINDS = ("gaussian", "rademacher", "orthogonal", "sjlt", "mask", "identity")


def random_map(kind: str, p: int, k: int, *key: object) -> RandomMap:
    """A map of p entries to k by its name.

    Args:
        kind: "gaussian", "rademacher", "orthogonal", "sjlt", "mask" or "identity" (k is p then).
        p: entries of a vector.
        k: entries of its image.
        key: what the map is drawn from: a seed, a name.

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
        return SJLT(p, k, seed)
    if kind == "mask":
        return Coordinates.random(p, min(k, p), seed)
    raise InvalidArgumentError(f"`projection` must be one of {', '.join(KINDS)}; got {kind!r}")
