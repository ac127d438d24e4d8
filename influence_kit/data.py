"""Batches of any usual kind, seen one way: tuple or list ``(*model_inputs, targets)``, or dict.

A tuple or list is called as ``model(*batch[:-1])`` with targets ``batch[-1]``. A dict is called as
``model(**batch)``, less the keys that the forward does not take; its targets are the dict itself.
"""

import copy
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)
from torch.utils.data.distributed import DistributedSampler

from influence_kit.errors import InvalidArgumentError
from influence_kit.iterables import refuse_one_pass

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


class Slices:
    """The batches of a ``TensorDataset``, cut out of its tensors: no example is looked up alone.

    Args:
        dataset: the examples.
        batch_size: how many of them a batch.
    """

    # for who looks examples up one by one, as in a DataLoader
    collate_fn = staticmethod(default_collate)

    def __init__(self, dataset: TensorDataset, batch_size: int) -> None:
        self.dataset, self.batch_size = dataset, batch_size
        self.batch_sampler = BatchSampler(SequentialSampler(dataset), batch_size, drop_last=False)

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self.dataset), self.batch_size):
            yield [tensor[start : start + self.batch_size] for tensor in self.dataset.tensors]


def as_loader(data: Any, batch_size: int | None, name: str) -> Iterable[Batch]:
    """Batches in a fixed order: ``data`` itself, or its examples ``batch_size`` at a time.

    Args:
        data: a ``Dataset`` or sequence of examples, or a ``DataLoader`` or other re-iterable of
            batches.
        batch_size: examples a batch, where ``data`` is a ``Dataset``.
        name: what to call ``data`` in an error.

    Raises:
        InvalidArgumentError: where the order changes between passes, so that indices mean nothing;
            where there can be one pass only.
    """
    refuse_one_pass(data, name)
    if is_dataset(data):
        if batch_size is None:
            raise InvalidArgumentError(
                f"since the `{name}` argument was a `Dataset`, `batch_size` must be an int."
            )
        if type(data) is TensorDataset:
            return Slices(data, batch_size)
        return DataLoader(data, batch_size=batch_size, shuffle=False)
    if isinstance(data, DataLoader):
        check_order(data, name)
        if data.drop_last:
            warnings.warn(
                f"`{name}` is a DataLoader with drop_last=True: the examples of a short last "
                "batch get no score",
                stacklevel=4,
            )
    batches: Iterable[Batch] = data
    return batches


def check_order(loader: object, name: str) -> None:
    """Refuse a loader that shuffles, or that sees only this rank's share of the data."""
    shuffling = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
    for sampler in _samplers(loader):
        distributed = isinstance(sampler, DistributedSampler)
        if isinstance(sampler, shuffling) or (distributed and sampler.shuffle):
            raise InvalidArgumentError(
                f"`{name}` is a DataLoader that shuffles ({type(sampler).__name__}): its indices "
                "would mean nothing; pass one with shuffle=False, or the Dataset itself"
            )
        if distributed and sampler.num_replicas > 1:
            raise InvalidArgumentError(
                f"`{name}` is a DataLoader of one rank's share (DistributedSampler), whose indices "
                "are not those of the data; pass one of all the data: each rank takes its share"
            )


def _samplers(loader: object) -> Iterator[Any]:
    """A loader's samplers, and those that they draw from."""
    for name in ("sampler", "batch_sampler"):
        sampler = getattr(loader, name, None)
        if sampler is not None:
            yield sampler
            yield from _samplers(sampler)


def loader_length(loader: object) -> int | None:
    """The number of batches, or None where the loader does not tell."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None
