"""IDX files, in which MNIST is distributed (http://yann.lecun.com/exdb/mnist).

A file is: two zero bytes, a code of the elements' type, the number of dimensions d, then d sizes as
big-endian 32-bit integers, then the elements. MNIST's images have magic number 2051 (bytes, three
dimensions), its labels 2049.
"""

import gzip
import math
import struct
from pathlib import Path

import numpy as np

from influence_kit.errors import InvalidArgumentError

UNSIGNED_BYTE = 0x08
GZIP_START = b"\x1f\x8b"


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The array of bytes in an IDX file, plain or compressed by gzip.

    Args:
        path: the file.
        dimensions: how many it must have: 3 for images ``[n, height, width]``, 1 for labels.

    Raises:
        InvalidArgumentError: for another magic number, or a file that is too short or too long.
    """
    content = path.read_bytes()
    if content.startswith(GZIP_START):
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError) as error:
            raise InvalidArgumentError(f"{path} cannot be decompressed: {error}") from error
    expected = UNSIGNED_BYTE << 8 | dimensions
    start = 4 + 4 * dimensions
    if len(content) < start:
        raise InvalidArgumentError(f"{path} has {len(content)} bytes, less than an IDX header")
    magic, *shape = struct.unpack(f">{1 + dimensions}I", content[:start])
    if magic != expected:
        raise InvalidArgumentError(
            f"{path} starts with the magic number {magic}; an IDX file of bytes with {dimensions} "
            f"dimension(s) starts with {expected}"
        )
    if len(content) - start != math.prod(shape):
        raise InvalidArgumentError(
            f"{path} says that it holds {shape} bytes and holds {len(content) - start}"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
