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
from torch.nn.utils.rnn import PackedSequence
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

from influence_kit.batch_axes import (
    BatchAxes,
    Known,
    KnownDict,
    KnownTuple,
    holds_tensor,
    known,
    leaves,
)
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
    if isinstance(batch, KnownDict):
        return batch.given
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


def example_count(batch: Batch) -> int:
    """The number of examples: as marked, or else as its shapes suggest."""
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
    if isinstance(item, KnownTuple):
        return tuple(items)
    return type(item)(*items) if hasattr(item, "_fields") else type(item)(items)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on ``device``: its tensors, and what else has a method ``to`` (graphs, say)."""
    moved: Batch = _moved(batch, device)
    return moved


def _moved(item: Any, device: torch.device) -> Any:
    if isinstance(item, Known):
        return known(_moved(item.given, device), item.n, item.axes)
    if isinstance(item, Tensor):
        return item.to(device, non_blocking=True)
    if isinstance(item, Mapping) or (isinstance(item, tuple | list) and _is_nest(item)):
        return _rebuilt(item, lambda value: _moved(value, device))
    return item.to(device) if callable(getattr(item, "to", None)) else item


def _is_nest(item: tuple[Any, ...] | list[Any]) -> bool:
    """Whether a tuple or list holds what can be on a device."""
    if isinstance(item, PackedSequence):
        return False
    return any(hasattr(value, "to") or isinstance(value, Mapping | tuple | list) for value in item)


def nbytes(batch: Batch) -> int:
    """What the tensors of a batch take, in bytes."""
    sizes: list[int] = []
    map_tensors(batch, lambda tensor: sizes.append(tensor.numel() * tensor.element_size()))
    return sum(sizes)


def take(batch: Batch, rows: slice | Tensor) -> Batch:
    """The batch of some of its examples; what is not one item an example is kept whole.

    A batch of one example is not cut: it may hold what only makes sense whole.
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
    """The batch with another item at a key of a dict or an index of a tuple or list."""
    if isinstance(batch, Known):
        return known(with_item(batch.given, key, value), batch.n, batch.axes)
    if isinstance(batch, Mapping):
        return {**batch, key: value}
    return tuple(value if index == key else item for index, item in enumerate(batch))


def with_count(batch: Batch, n: int) -> Batch:
    """A marked batch that now has n examples."""
    return known(batch.given, n, batch.axes) if isinstance(batch, Known) else batch


def tensor_axes(batch: Batch) -> list[int | None]:
    """The dimension that counts examples of each tensor, in the order of ``map_tensors``."""
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
    """The dimension of a tensor that most likely counts examples; None where none does."""
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
