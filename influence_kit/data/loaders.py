"""Loaders of batches: a data set cut into batches, and a check that a loader's order is fixed."""

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    SequentialSampler,
    TensorDataset,
    default_collate,
)
from torch.utils.data.distributed import DistributedSampler

from influence_kit.data.batches import Batch, is_dataset
from influence_kit.data.index_order import LISTED, fixed_order, index_sampler, listed_rows
from influence_kit.data.input_checks import reads_once, refuse_no_data
from influence_kit.errors import InvalidArgumentError

# data that only a fit reads: results hold no indices of its examples
HESSIAN_DATA, EVAL_DATA = "hessian_dataset", "eval_dataset"


class Slices:
    """The batches of a ``TensorDataset`` as slices of its tensors, without reading single examples.

    Args:
        dataset: the examples.
        batch_size: examples per batch.
    """

    # for code that collates single examples, as a DataLoader does
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
    """Batches in a fixed order: ``data`` itself, or its examples, ``batch_size`` per batch.

    Args:
        data: a ``Dataset`` or sequence of examples, or a ``DataLoader`` or other re-iterable of
            batches.
        batch_size: examples per batch, if ``data`` is a ``Dataset``.
        name: the name of the argument, for errors.

    Raises:
        InvalidArgumentError: if the order changes between passes, so that indices mean nothing, or
            if the data can be read only once.
    """
    refuse_no_data(data, name)
    if is_dataset(data):
        if batch_size is None:
            raise InvalidArgumentError(
                f"since the `{name}` argument was a `Dataset`, `batch_size` must be an int."
            )
        if type(data) is TensorDataset:
            return Slices(data, batch_size)
        return DataLoader(data, batch_size=batch_size, shuffle=False)
    check_order(data, name, of_results=name not in (HESSIAN_DATA, EVAL_DATA))
    if isinstance(data, DataLoader) and data.drop_last:
        warnings.warn(
            f"`{name}` is a DataLoader with drop_last=True: the examples of a short last "
            "batch get no scores",
            stacklevel=4,
        )
    batches: Iterable[Batch] = data
    return batches


def check_order(loader: Any, name: str, of_results: bool = False) -> None:
    """Refuse a loader that shuffles, or that reads only this rank's share of the data.

    Args:
        loader: a loader.
        name: the name of the argument, for errors.
        of_results: whether results hold indices of its examples: then an order other than that of
            its data set causes a warning.
    """
    if reads_once(loader):
        raise InvalidArgumentError(
            f"`{name}` is a {type(loader).__name__}, which can be read only once, but it is read "
            "several times; pass a DataLoader, a Dataset, or an object whose `__iter__` starts "
            "again"
        )
    for sampler in _samplers(loader):
        if isinstance(sampler, DistributedSampler) and sampler.num_replicas > 1:
            raise InvalidArgumentError(
                f"`{name}` is a DataLoader of one rank's share (DistributedSampler), whose indices "
                "are not those of the data; pass one of all the data: each rank computes its share"
            )
        if reads_once(sampler):
            raise InvalidArgumentError(
                f"`{name}` is a DataLoader whose sampler is a {type(sampler).__name__}, which can "
                "be read only once; pass a list of its indices as `sampler`"
            )
    if not getattr(loader, "in_order", True) and getattr(loader, "num_workers", 0) > 1:
        raise InvalidArgumentError(
            f"`{name}` is a DataLoader with in_order=False and {loader.num_workers} workers: "
            "batches come in the order they are ready, and indices would mean nothing; leave out "
            "`in_order`"
        )
    sampler = index_sampler(loader)
    if sampler is None:
        return
    indices = fixed_order(sampler)
    if indices is None:
        raise InvalidArgumentError(
            f"`{name}` is a DataLoader that shuffles ({_name_of(loader)}): its indices "
            "would mean nothing; pass one with shuffle=False, or the Dataset itself"
        )
    if of_results:
        _warn_of_indices(loader, indices, name)


def _warn_of_indices(loader: Any, listed: list[Any], name: str) -> None:
    """Warn if indices in results are not those of the data set."""
    count = loader_length(getattr(loader, "dataset", None))
    in_order = listed == list(range(len(listed)))
    whole = len(listed) == count or len(listed) == LISTED or getattr(loader, "drop_last", False)
    if count is None or (in_order and whole):
        return
    by_batch = getattr(loader, "batch_sampler", None) is not None
    indices = "[i for batch in loader.batch_sampler for i in batch]"
    warnings.warn(
        f"`{name}` is a DataLoader whose {_name_of(loader)} does not give each of the {count} "
        "examples of its Dataset once and in order: indices in results count the examples as the "
        f"loader gives them. `{indices if by_batch else 'list(loader.sampler)'}` lists the indices "
        "in the Dataset",
        stacklevel=5,
    )


def _samplers(loader: object) -> Iterator[Any]:
    """A loader's samplers, and their inner samplers."""
    for name in ("sampler", "batch_sampler"):
        sampler = getattr(loader, name, None)
        if sampler is not None:
            yield sampler
            yield from _samplers(sampler)


def _name_of(loader: object) -> str:
    """The class that decides the order: the outermost that is not a plain ``BatchSampler``."""
    sampler = index_sampler(loader)
    while type(sampler) is BatchSampler:
        sampler = sampler.sampler
    return type(sampler).__name__


def promised_rows(loader: Any) -> int | None:
    """The number of examples in a pass, or None if the loader has no length."""
    if isinstance(loader, Slices):
        return len(loader.dataset)
    if not isinstance(loader, DataLoader):
        return None
    if isinstance(loader.dataset, IterableDataset):
        # each worker drops its own last batch; without a batch size, an item may be a batch
        is_known = not loader.drop_last and loader.batch_size is not None
        return loader_length(loader.dataset) if is_known else None
    return listed_rows(loader)


def loader_length(loader: object) -> int | None:
    """The number of batches, or None if the loader has no length."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None
