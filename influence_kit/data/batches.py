"""Batches: a tuple or list ``(*model_inputs, targets)``, or a dict.

For a tuple or list, the model is called as ``model(*batch[:-1])`` and the targets are
``batch[-1]``. For a dict, it is called as ``model(**batch)``, without the keys that its ``forward``
does not take; the targets are the dict itself.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import DataLoader, Dataset

from influence_kit.data.batch_axes import BatchAxes
from influence_kit.data.marked_batch import (
    Known,
    KnownDict,
    KnownTuple,
    holds_tensor,
    known,
    leaves,
)

Batch = tuple[Any, ...] | list[Any] | Mapping[str, Any]

# an item that the loss of a dict batch reads, and the model is not given
SLOPES = "influence_kit.slopes"


def is_batch(inputs: object) -> bool:
    """Whether ``inputs`` is one batch (rather than a loader of batches)."""
    return isinstance(inputs, tuple | list | Mapping)


def is_dataset(data: object) -> bool:
    """Whether ``data`` holds examples, not batches: torch's Dataset, a list, a table of rows."""
    is_sequence = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    return isinstance(data, Dataset) or (is_sequence and not isinstance(data, DataLoader))


def targets_of(batch: Batch) -> Any:
    """The second argument of the loss, after the model's output: the last item, or the dict."""
    if isinstance(batch, KnownDict):
        return batch.given
    return batch if isinstance(batch, Mapping) else batch[-1]


def call_arguments(model: nn.Module, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments with which the model is called on a batch."""
    if not isinstance(batch, Mapping):
        return tuple(batch[:-1]), {}
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    given = {key: value for key, value in batch.items() if key != SLOPES}
    return (), {key: value for key, value in given.items() if takes_any or key in parameters}


def call_model(model: nn.Module, batch: Batch) -> Any:
    """The model's output on a batch."""
    args, kwargs = call_arguments(model, batch)
    return model(*args, **kwargs)


def example_count(batch: Batch) -> int:
    """The number of examples: the marked one, else inferred from the shapes."""
    return _known(batch).n


def _known(batch: Batch) -> Known:
    return batch if isinstance(batch, Known) else BatchAxes().mark(batch)


def map_tensors(item: Any, change: Callable[[Tensor], Any]) -> Any:
    """The same nesting of tuples, lists and dicts with every tensor changed."""
    if isinstance(item, Known):
        return known(map_tensors(item.given, change), item.n, item.axes)
    if isinstance(item, Tensor):
        return change(item)
    if isinstance(item, PackedSequence):
        return item._replace(data=change(item.data))
    if isinstance(item, Mapping) or holds_tensor(item):
        return _rebuilt(item, lambda value: map_tensors(value, change))
    return item


def map_outputs(outputs: Any, change: Callable[[Tensor], Any]) -> Any:
    """``map_tensors`` for what a model returns: also an object of another class holding tensors."""
    if isinstance(outputs, Tensor | Mapping | tuple | list) or not hasattr(outputs, "__dict__"):
        return map_tensors(outputs, change)
    same = copy.copy(outputs)
    for name, value in vars(outputs).items():
        object.__setattr__(same, name, map_tensors(value, change))
    return same


def _rebuilt(item: Any, change: Callable[[Any], Any]) -> Any:
    """A tuple, list or dict of the same type (a ``BatchEncoding``, say) with changed items."""
    if isinstance(item, Mapping):
        values = {key: change(value) for key, value in item.items()}
        if not isinstance(item, MutableMapping):
            return values
        same = copy.copy(item)
        for key, value in values.items():  # some model outputs refuse ``update``
            same[key] = value
        return same
    items = [change(value) for value in item]
    if isinstance(item, KnownTuple):
        return tuple(items)
    return type(item)(*items) if hasattr(item, "_fields") else type(item)(items)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on ``device``: its tensors, and other items with a method ``to`` (graphs, say)."""
    moved: Batch = _moved(batch, device)
    return moved


def _moved(item: Any, device: torch.device) -> Any:
    if isinstance(item, Known):
        return known(_moved(item.given, device), item.n, item.axes)
    if isinstance(item, Tensor):
        moved = item.to(device, non_blocking=True)
        # autograd cannot save tensors made in inference mode
        return moved.clone() if moved.is_inference() else moved
    if isinstance(item, Mapping) or (isinstance(item, tuple | list) and _is_nest(item)):
        return _rebuilt(item, lambda value: _moved(value, device))
    return item.to(device) if callable(getattr(item, "to", None)) else item


def _is_nest(item: tuple[Any, ...] | list[Any]) -> bool:
    """Whether a tuple or list holds items that can be moved to a device."""
    if isinstance(item, PackedSequence):
        return False
    return any(hasattr(value, "to") or isinstance(value, Mapping | tuple | list) for value in item)


def nbytes(batch: Batch) -> int:
    """The size of a batch's tensors in bytes."""
    sizes: list[int] = []
    map_tensors(batch, lambda tensor: sizes.append(tensor.numel() * tensor.element_size()))
    return sum(sizes)


def take(batch: Batch, rows: slice | Tensor) -> Batch:
    """A batch of some of the examples; items that are not one per example are kept unchanged.

    A batch of one example is not cut: it may hold items that only make sense as a whole.
    """
    whole = _known(batch)
    count = len(range(whole.n)[rows]) if isinstance(rows, slice) else len(rows)
    if whole.n == count == 1:
        return batch
    some: Batch = _cut(whole.given if isinstance(batch, Known) else batch, rows, iter(whole.axes))
    return known(some, count, whole.axes) if isinstance(batch, Known) else some


def _cut(item: Any, rows: slice | Tensor, axes: Iterator[int | None]) -> Any:
    if isinstance(item, PackedSequence):
        return item
    if isinstance(item, Tensor):
        axis = next(axes)
        if axis is None:
            return item
        if isinstance(rows, Tensor):
            return item.index_select(axis, rows.to(item.device))
        return item[(slice(None),) * axis + (rows,)]
    if isinstance(item, Mapping) or (isinstance(item, tuple | list) and holds_tensor(item)):
        return _rebuilt(item, lambda value: _cut(value, rows, axes))
    if isinstance(item, tuple | list) and item and next(axes) is not None:
        index = range(len(item))[rows] if isinstance(rows, slice) else rows.tolist()
        return [item[i] for i in index]
    return item


def with_item(batch: Batch, key: Any, value: Any) -> Batch:
    """The batch with its item at a key (of a dict) or index (of a tuple or list) replaced.

    A key that the dict lacks is added, for a tensor whose first dimension counts examples.
    """
    if isinstance(batch, Known):
        added = (0,) if isinstance(batch, Mapping) and key not in batch else ()
        return known(with_item(batch.given, key, value), batch.n, (*batch.axes, *added))
    if isinstance(batch, Mapping):
        return {**batch, key: value}
    return tuple(value if index == key else item for index, item in enumerate(batch))


def with_count(batch: Batch, n: int) -> Batch:
    """The batch, marked as holding n examples."""
    return known(batch.given, n, batch.axes) if isinstance(batch, Known) else batch


def tensor_axes(batch: Batch) -> list[int | None]:
    """The dimension of each tensor that counts examples, in the order of ``map_tensors``."""
    marked = _known(batch)
    found = zip(leaves(marked.given), marked.axes, strict=True)
    return [axis for leaf, axis in found if isinstance(leaf, Tensor)]


def example_lengths(batch: Batch) -> list[list[int]]:
    """The lengths of a batch's tensors, without those that count examples."""
    marked = _known(batch)
    return [
        [length for dim, length in enumerate(leaf.shape) if dim != axis]
        for leaf, axis in zip(leaves(marked.given), marked.axes, strict=True)
        if isinstance(leaf, Tensor)
    ]


def example_axis(tensor: Tensor, n: int) -> int | None:
    """The dimension of a tensor that most likely counts examples, or None."""
    if tensor.dim() > 0 and tensor.shape[0] == n:
        return 0
    # time-first inputs [t, n, ...] of recurrent networks
    return 1 if tensor.dim() > 1 and tensor.shape[1] == n else None


def split(batch: Batch, size: int) -> Iterator[Batch]:
    """The batch in pieces of at most ``size`` examples."""
    n = example_count(batch)
    if n <= size:
        yield batch
        return
    for start in range(0, n, size):
        yield take(batch, slice(start, start + size))
