"""Fingerprints of batches, which show whether a batch has changed."""

import hashlib
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from influence_kit.core.dtypes import as_bytes
from influence_kit.data.batches import example_count, take
from influence_kit.data.marked_batch import KnownTuple

# how many entries of a tensor are hashed, from all over it
ENTRIES = 1 << 16
# parts of the keys of a dict that hold what is to be predicted
TARGET_KEYS = ("label", "target")
# distinct orders of a batch's targets: with fewer, a shuffled batch may keep its targets by chance
FEWEST_ORDERS = 1000
# the errors of batches that cannot be cut into rows
UNLIKE_ROWS = (ValueError, TypeError, IndexError, RuntimeError)


class Fingerprint(NamedTuple):
    """Hashes of the bytes of a batch: NaN equals NaN."""

    inputs: bytes
    targets: bytes


def fingerprint(batch: Any) -> Fingerprint:
    """The fingerprint of a batch: equal for equal numbers, texts and shapes."""
    return Fingerprint(*map(_hash, _inputs_and_targets(batch)))


def same_rows(one: Any, other: Any) -> bool:
    """Whether two batches hold the same examples, in any order."""
    try:
        return Counter(map(_hash, _examples(one))) == Counter(map(_hash, _examples(other)))
    except UNLIKE_ROWS:
        return False


def targets_repeat(batch: Any) -> bool:
    """Whether another order of the examples could easily leave a batch's targets unchanged."""
    try:
        counts = Counter(_hash(_inputs_and_targets(row)[1]) for row in _examples(batch))
    except UNLIKE_ROWS:
        return True
    n = sum(counts.values())
    orders = math.lgamma(n + 1) - sum(math.lgamma(count + 1) for count in counts.values())
    return orders < math.log(FEWEST_ORDERS)


def _examples(batch: Any) -> list[Any]:
    return [take(batch, slice(i, i + 1)) for i in range(example_count(batch))]


def _inputs_and_targets(batch: Any) -> tuple[Any, Any]:
    if isinstance(batch, KnownTuple):  # hashed as before it was marked
        batch = batch.given
    if isinstance(batch, Mapping):
        targets = {key: v for key, v in batch.items() if _is_target(str(key))}
        return {key: v for key, v in batch.items() if key not in targets}, targets
    if isinstance(batch, tuple | list) and len(batch) > 1:
        return tuple(batch[:-1]), batch[-1]
    return batch, ()


def _is_target(key: str) -> bool:
    return key == "y" or any(part in key.lower() for part in TARGET_KEYS)


def _hash(item: Any) -> bytes:
    found = hashlib.blake2b(digest_size=16)
    _add(found, item)
    return found.digest()


def _add(found: Any, item: Any) -> None:
    """Add what an item holds; nothing for an object of an unknown kind."""
    if isinstance(item, Tensor):
        found.update(f"{item.dtype}{tuple(item.shape)}".encode())
        if item.layout == torch.strided and item.device.type != "meta":
            found.update(_some_bytes(item.detach()))
    elif isinstance(item, Mapping):
        for key, value in item.items():
            found.update(repr(key).encode())
            _add(found, value)
    elif isinstance(item, tuple | list):
        found.update(f"{type(item).__name__}{len(item)}".encode())
        for value in item:
            _add(found, value)
    elif item is None or isinstance(item, str | bytes | int | float | complex):
        found.update(repr(item).encode())
    elif hasattr(item, "tobytes") and str(getattr(item, "dtype", "")) != "object":
        found.update(item.tobytes())
    elif callable(getattr(item, "to_dict", None)):
        _add(found, item.to_dict())


def _some_bytes(tensor: Tensor) -> Any:
    # an odd step, so that not only one column of a matrix of even width is hashed
    step = tensor.numel() // ENTRIES + 1 | 1 if tensor.numel() > ENTRIES else 1
    return as_bytes(tensor.flatten()[::step].cpu()).numpy()
