"""A fingerprint of a data set, cheap enough to be computed in every call, to detect changes.

It covers the number of examples; the tensors, arrays and lists that the data set holds (as
attributes, in nested lists and dicts, in data sets that it wraps); and, unless the data set is only
its tensors, a few examples as it returns them. Small values are compared whole, the smallest first,
up to ``WHOLE_BYTES`` in all (5 ms); of larger ones, rows spread over them and torch's version
counter. Not detected: a change between those rows that torch did not make (in a large numpy array,
a memory map), entries that are not sampled of lists of more than ``ITEMS`` or dicts of more than
``FEW`` entries, and files on disk that those few examples do not read.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    SequentialSampler,
    TensorDataset,
)

from influence_kit.core.dtypes import as_bytes
from influence_kit.data.index_order import first_indices
from influence_kit.data.loaders import loader_length

WHOLE_BYTES = 2**24
# rows that are compared of larger values
ROWS = 64
# lists up to this length are compared by values; of longer ones, at most this many entries
FEW, ITEMS = 256, 50_000
EXAMPLES = 8
DEPTH = 6
# attributes of a sampler: its data set is fingerprinted itself
SEEN = ("data_source", "dataset")

PLAIN = {int, float, complex, bool, str, bytes, type(None)}

Leaf = Callable[[bool], Any]


def data_fingerprint(data: Any) -> dict[str, Any]:
    """The parts of the fingerprint by name; some differ if the data set has changed.

    Args:
        data: a ``Dataset`` or sequence of examples, or a ``DataLoader`` or other iterable of them.
    """
    source = data.dataset if isinstance(data, DataLoader) else data
    found: dict[str, Any] = {"number of examples": loader_length(source)}
    leaves = dict(_leaves("data", source, DEPTH))
    if isinstance(data, DataLoader):
        index = data.sampler if data.batch_sampler is None else data.batch_sampler
        leaves.update(_leaves("sampler", index, DEPTH))
    if type(source) is not TensorDataset and not isinstance(source, list | tuple):
        for key, example in _examples(data, source):
            leaves.update(_leaves(f"example {key}", example, DEPTH))
    left = WHOLE_BYTES
    for name, (size, leaf) in sorted(leaves.items(), key=lambda item: item[1][0]):
        left -= size
        found[name] = leaf(left >= 0)
    return found


def what_changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    """The first difference, in words; None if there is none."""
    for name, value in before.items():
        if name not in after or after[name] != value:
            if name == "number of examples":
                return f"{value} examples then, {after[name]} now"
            return f"{name} has changed"
    return None


def _leaves(name: str, item: Any, depth: int) -> Iterator[tuple[str, tuple[int, Leaf]]]:
    """The comparable values in nested containers and data sets: name, size and fingerprint."""
    if isinstance(item, nn.Module) or depth < 0:
        return
    if isinstance(item, np.ndarray) and item.dtype != object:
        yield name, (item.nbytes, lambda whole: _of_array(item, whole))
    elif isinstance(item, Tensor):
        yield name, (_bytes(item), lambda whole: tensor_fingerprint(item, whole))
    elif isinstance(item, str | bytes | bool | int | float | complex | np.generic | None):
        yield name, (0, lambda whole: item)
    elif isinstance(item, list | tuple | np.ndarray):
        yield from _of_list(name, item, depth)
    elif isinstance(item, Mapping):
        yield f"the length of {name}", (0, lambda whole: len(item))
        for key, value in islice(item.items(), FEW):
            yield from _leaves(f"{name}[{key!r}]", value, depth - 1)
    elif type(item).__module__.startswith("pandas."):
        yield from _leaves(name, item.to_numpy(), depth)
    elif isinstance(item, Dataset | Sampler) or (depth == DEPTH and hasattr(item, "__dict__")):
        for key, value in vars(item).items():
            # numbers are often counters of what was read
            counts = isinstance(value, bool | int | float | complex | None)
            if not counts and not (isinstance(item, Sampler) and key in SEEN):
                yield from _leaves(f"{name}.{key}", value, depth - 1)


def _of_list(name: str, item: Any, depth: int) -> Iterator[tuple[str, tuple[int, Leaf]]]:
    yield f"the length of {name}", (0, lambda whole: len(item))
    if len(item) > FEW:
        some = item[:: -(-len(item) // ITEMS)]
        yield name, (0, lambda whole: hash(_quick(list(some))))
        return
    for number, value in enumerate(item):
        yield from _leaves(f"{name}[{number}]", value, depth - 1)


def _quick(item: Any) -> Any:
    """The fingerprint of an entry of a long list: its value, or the identity of a large one."""
    if type(item) in PLAIN:
        return item
    if isinstance(item, list | tuple):
        return tuple([part if type(part) in PLAIN else _quick(part) for part in item])
    if isinstance(item, Tensor):
        value = item.item() if item.numel() == 1 and not item.is_meta else None
        return id(item), None if item.is_inference() else item._version, value
    if isinstance(item, dict):
        return tuple([_quick(part) for part in item.values()])
    if isinstance(item, np.ndarray | np.generic):
        return id(item), item.tobytes() if item.nbytes <= FEW else None
    return id(item)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def tensor_fingerprint(tensor: Tensor, whole: bool = True) -> Any:
    """Of all values, or of rows spread over the tensor and its version counter."""
    kind = str(tensor.dtype), tuple(tensor.shape)
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        return kind
    changes = None
    if not whole and tensor.dim() and len(tensor) > ROWS:
        changes = None if tensor.is_inference() else tensor._version
        tensor = tensor[torch.linspace(0, len(tensor) - 1, ROWS).long().to(tensor.device)]
    return kind, changes, zlib.crc32(as_bytes(tensor.detach().cpu()).numpy().data)


def _of_array(array: np.ndarray, whole: bool) -> Any:
    some = not whole and array.ndim and len(array) > ROWS
    rows = array if not some else array[np.linspace(0, len(array) - 1, ROWS).astype(np.int64)]
    return str(array.dtype), array.shape, zlib.crc32(np.ascontiguousarray(rows).tobytes())


def _examples(data: Any, source: Any) -> Iterator[tuple[Any, Any]]:
    """A few examples by index, spread over those that are read, if the data set has indices."""
    if not hasattr(source, "__getitem__") or isinstance(source, IterableDataset):
        return
    keys: Any = range(loader_length(source) or 0)
    if isinstance(data, DataLoader):
        sampler = getattr(data.batch_sampler, "sampler", None)
        if isinstance(sampler, list | tuple):
            keys = sampler
        elif not isinstance(sampler, SequentialSampler):
            # the first batch only: others may be expensive
            batches = data.batch_sampler
            keys = () if batches is None else first_indices(batches, batch=True)
    last = len(keys) - 1
    for number in sorted(
        {round(i * last / (EXAMPLES - 1)) for i in range(EXAMPLES)} if keys else ()
    ):
        yield keys[number], source[keys[number]]
