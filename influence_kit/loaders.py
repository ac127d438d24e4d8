"""Loaders of batches: a data set cut into batches, and loaders whose order can be relied on."""

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)
from torch.utils.data.distributed import DistributedSampler

from influence_kit.data import Batch, is_dataset
from influence_kit.errors import InvalidArgumentError


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
        InvalidArgumentError: where the order changes between passes, so that indices mean nothing.
    """
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
