"""Batches of any usual kind, seen one way: tuple or list ``(*model_inputs, targets)``, or dict.

A tuple or list is called as ``model(*batch[:-1])`` with targets ``batch[-1]``. A dict is called as
``model(**batch)``, less the keys that the forward does not take; its targets are the dict itself.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from influence_kit.errors import InvalidArgumentError

Batch = tuple[Any, ...] | list[Any] | Mapping[str, Any]


def is_batch(inputs: object) -> bool:
    """Whether ``inputs`` is one batch (rather than a loader of batches)."""
    return isinstance(inputs, tuple | list | Mapping)


def is_dataset(data: object) -> bool:
    """Whether ``data`` holds examples, not batches: torch's Dataset, a list, a table of rows."""
    by_place = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    return isinstance(data, Dataset) or (by_place and not isinstance(data, DataLoader))


def targets_of(batch: Batch) -> Any:
    """What the loss takes beside the model's output: the last item, or the whole dict."""
    return batch if isinstance(batch, Mapping) else batch[-1]


def call_arguments(model: nn.Module, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments with which the model is called on a batch."""
    if not isinstance(batch, Mapping):
        return tuple(batch[:-1]), {}
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return (), {key: value for key, value in batch.items() if takes_any or key in parameters}


def call_model(model: nn.Module, batch: Batch) -> Any:
    """The model's output on a batch."""
    args, kwargs = call_arguments(model, batch)
    return model(*args, **kwargs)


def _tensors(item: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    if isinstance(item, Tensor):
        yield item
    elif isinstance(item, Mapping):
        for value in item.values():
            yield from _tensors(value)
    elif isinstance(item, tuple | list):
        for value in item:
            yield from _tensors(value)


def example_count(batch: Batch) -> int:
    """The number of examples: the length of the targets (of a dict: of its first tensor)."""
    items = batch if isinstance(batch, Mapping) else list(batch)[::-1]
    first = next((tensor for tensor in _tensors(items) if tensor.dim() > 0), None)
    if first is not None and len(first):
        return len(first)
    raise InvalidArgumentError(
        f"a batch must hold a tensor with one row an example; got {_describe(batch)}"
    )


def _describe(item: Any) -> str:
    if isinstance(item, Tensor):
        return f"a tensor of shape {list(item.shape)}"
    if isinstance(item, Mapping):
        return "a dict of " + ", ".join(f"{k}: {_describe(v)}" for k, v in item.items())
    if isinstance(item, tuple | list):
        return f"a {type(item).__name__} of " + ", ".join(map(_describe, item))
    return f"a {type(item).__name__}"


def map_tensors(item: Any, change: Callable[[Tensor], Any]) -> Any:
    """The same nesting of tuples, lists and dicts with every tensor changed."""
    if isinstance(item, Tensor):
        return change(item)
    if isinstance(item, Mapping) or any(True for _ in _tensors(item)):
        return _rebuilt(item, lambda value: map_tensors(value, change))
    return item


def _rebuilt(item: Any, change: Callable[[Any], Any]) -> Any:
    """A tuple, list or dict of the same type (a ``BatchEncoding``, say), its items changed."""
    if isinstance(item, Mapping):
        values = {key: change(value) for key, value in item.items()}
        if not isinstance(item, MutableMapping):
            return values
        same = copy.copy(item)
        for key, value in values.items():  # some outputs of models refuse ``update``
            same[key] = value
        return same
    items = [change(value) for value in item]
    return type(item)(*items) if hasattr(item, "_fields") else type(item)(items)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on ``device``."""
    moved: Batch = map_tensors(batch, lambda tensor: tensor.to(device, non_blocking=True))
    return moved


def nbytes(batch: Batch) -> int:
    """What the tensors of a batch take, in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(batch))


def take(batch: Batch, rows: slice | Tensor) -> Batch:
    """The batch of some of its examples; what is not one item an example is kept whole."""
    n = example_count(batch)
    some: Batch = _rebuilt(batch, lambda value: _take(value, rows, n))
    return some


def example_axis(tensor: Tensor, n: int) -> int | None:
    """The dimension of a batch's tensor that counts examples; None where none does."""
    if tensor.dim() > 0 and tensor.shape[0] == n:
        return 0
    # time-first inputs [t, n, ...] of recurrent networks
    return 1 if tensor.dim() > 1 and tensor.shape[1] == n else None


def _take(item: Any, rows: slice | Tensor, n: int) -> Any:
    if isinstance(item, Tensor):
        axis = example_axis(item, n)
        return item if axis is None else item[rows] if axis == 0 else item[:, rows]
    if isinstance(item, tuple | list) and not any(True for _ in _tensors(item)):
        if len(item) != n:
            return item
        index = range(n)[rows] if isinstance(rows, slice) else rows.tolist()
        return [item[i] for i in index]
    if isinstance(item, tuple | list | Mapping):
        return _rebuilt(item, lambda value: _take(value, rows, n))
    return item


def split(batch: Batch, size: int) -> Iterator[Batch]:
    """The batch in pieces of at most ``size`` examples."""
    n = example_count(batch)
    if n <= size:
        yield batch
        return
    for start in range(0, n, size):
        yield take(batch, slice(start, start + size))
