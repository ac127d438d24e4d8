"""A hash of all tensors of a data set."""

import hashlib
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from influence_kit.core.dtypes import as_bytes
from influence_kit.data.batches import Batch, map_tensors


def hash_of(batches: Iterable[Batch]) -> str:
    """A hash of all tensors of a data set, independent of how they are batched."""
    hashes: dict[int, Any] = {}
    for batch in batches:
        tensors: list[Tensor] = []
        map_tensors(batch, tensors.append)
        for place, tensor in enumerate(tensors):
            own = hashes.setdefault(place, hashlib.sha256(str(tensor.dtype).encode()))
            own.update(as_bytes(tensor.cpu()).numpy())
    return hashlib.sha256(b"".join(h.digest() for h in hashes.values())).hexdigest()
