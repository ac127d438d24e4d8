"""Random numbers that depend on a key alone, and not on the device, rank or process.

They are made from the raw output of Philox, a counter-based generator (Salmon et al., SC 2011): a
key is a stream, and each part of a stream begins at its own value of the counter. So no two parts
of a stream share a number, and two streams are equal only if 128 bits of SHA-256 are.
"""

import hashlib
from numbers import Integral

import numpy as np
import torch
from torch import Tensor

from influence_kit.core.arguments import shown
from influence_kit.errors import InvalidArgumentError


def key_of(*parts: object) -> int:
    """A key of 128 bits: the SHA-256 of the parts, shortened."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:16], "little")


def check_seed(seed: int) -> int:
    """The seed, as an int of Python (numpy has integer types of its own).

    Raises:
        InvalidArgumentError: for anything but an int from 0 to 2^63 - 1.
    """
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= seed < 2**63:
        raise InvalidArgumentError(f"`seed` must be an int that is not negative; got {shown(seed)}")
    return int(seed)


class Draws:
    """Random numbers from one part of a stream, one after the other.

    Args:
        key: the stream, below 2^128.
        part: which part of it, below 2^64.
    """

    def __init__(self, key: int, part: int = 0) -> None:
        # a generator of torch is seeded with the last 32 bits of a key only, and how numpy turns
        # raw numbers into distributions may change from version to version
        self._philox = np.random.Philox(key=key, counter=part << 192)

    def _raw(self, count: int) -> "np.ndarray[tuple[int], np.dtype[np.uint64]]":
        return self._philox.random_raw(count)

    def normal(self, *shape: int) -> Tensor:
        """Independent normal numbers, in float64."""
        raw = torch.from_numpy((self._raw(int(np.prod(shape))) >> np.uint64(12)).view(np.int64))
        # the middle of one of 2^52 equal parts of the unit interval, so neither 0 nor 1
        numbers: Tensor = torch.special.ndtri(raw.double().add_(0.5).mul_(2.0**-52))
        return numbers.view(shape)

    def bits(self, *shape: int) -> Tensor:
        """Independent numbers 0 and 1, in uint8."""
        count = int(np.prod(shape))
        raw = self._raw(-(-count // 64)).astype("<u8", copy=False).view(np.uint8)
        return torch.from_numpy(np.unpackbits(raw, count=count, bitorder="little")).view(shape)

    def signs(self, *shape: int) -> Tensor:
        """Independent numbers -1 and 1, in float64."""
        return self.bits(*shape).double().mul_(2).sub_(1)

    def below(self, end: int, count: int) -> Tensor:
        """Independent numbers from 0 to ``end - 1``, int64 ``[count]``."""
        return torch.from_numpy((self._raw(count) % np.uint64(end)).view(np.int64))

    def order(self, count: int) -> Tensor:
        """The indices from 0 to ``count - 1`` in a random order, int64 ``[count]``."""
        # random numbers whose last bits are the index, sorted
        bits = np.uint64(max(1, (count - 1).bit_length()))
        numbers = (self._raw(count) >> bits << bits) | np.arange(count, dtype=np.uint64)
        numbers.sort()
        indices = numbers & ((np.uint64(1) << bits) - np.uint64(1))
        return torch.from_numpy(indices.view(np.int64))
