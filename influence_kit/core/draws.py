"""Random numbers that a key alone decides: for any device, rank and process.

They are made from the raw numbers of Philox, which counts (Salmon et al., SC 2011): a key is a
stream, and each part of a stream begins at a count of its own. So no two parts of a stream share a
number, and two streams are alike only if 128 bits of SHA-256 are.
"""

import hashlib
from numbers import Integral

import numpy as np
import torch
from torch import Tensor

from influence_kit.errors import InvalidArgumentError


def key_of(*parts: object) -> int:
    """A key of 128 bits for whatever the parts tell apart."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:16], "little")


def check_seed(seed: int) -> int:
    """The seed as given, as an int of Python (numpy has others).

    Raises:
        InvalidArgumentError: for anything but an int from 0 to 2^63 - 1.
    """
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= seed < 2**63:
        raise InvalidArgumentError(f"`seed` must be an int that is not negative; got {seed!r}")
    return int(seed)


class Draws:
    """Numbers of one part of a stream, one after the other.

    Args:
        key: the stream, below 2^128.
        part: which part of it, below 2^64.
    """

    def __init__(self, key: int, part: int = 0) -> None:
        # a generator of torch is seeded by the last 32 bits of a key alone, and what numpy makes
        # of raw numbers may change from version to version
        self._philox = np.random.Philox(key=key, counter=part << 192)

    def _raw(self, count: int) -> "np.ndarray[tuple[int], np.dtype[np.uint64]]":
        return self._philox.random_raw(count)

    def normal(self, *shape: int) -> Tensor:
        """Independent normal numbers, in float64."""
        raw = torch.from_numpy((self._raw(int(np.prod(shape))) >> np.uint64(12)).view(np.int64))
        # in the middle of 2^52 equal parts of the unit interval, of which no end is taken
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
        """The places below ``count`` in a random order, int64 ``[count]``."""
        # sorted by random numbers, of which each has its place for last bits
        bits = np.uint64(max(1, (count - 1).bit_length()))
        numbers = (self._raw(count) >> bits << bits) | np.arange(count, dtype=np.uint64)
        numbers.sort()
        places = numbers & ((np.uint64(1) << bits) - np.uint64(1))
        return torch.from_numpy(places.view(np.int64))
