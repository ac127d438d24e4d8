"""Draws a few examples of a loader several times, to see whether they are the same each time."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    Subset,
    TensorDataset,
    default_collate,
)

from influence_kit.core.random_states import kept_random_state
from influence_kit.data.batches import Batch
from influence_kit.data.index_order import LISTED, first_indices
from influence_kit.data.loaders import loader_length

# the number of examples, and how often each is drawn: 4 images that are randomly flipped come out
# the same in all 4 draws with probability 1/4096
EXAMPLES, DRAWS = 4, 4
SEED = 31_337


def is_constant(loader: Any) -> bool:
    """Whether a loader is known to give the same examples in each pass."""
    data = getattr(loader, "dataset", None)
    while type(data) is Subset:
        data = data.dataset
    if type(data) not in (TensorDataset, list, tuple):
        return False
    return loader.collate_fn is default_collate and not _has_own_loop(loader)


def reads_by_index(loader: Any) -> bool:
    """Whether a loader does nothing but look up examples by the indices of a sampler."""
    by_index = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
    return by_index and not _has_own_loop(loader)


def _has_own_loop(loader: Any) -> bool:
    return isinstance(loader, DataLoader) and type(loader).__iter__ is not DataLoader.__iter__


def drawn_by_index(loader: Any) -> list[Batch]:
    """Batches of the same few examples, each drawn as the loader itself would draw it.

    Empty if the loader cannot make a batch of examples from all over the data.
    """
    some = _some_indices(loader)
    if not some:
        return []
    by_batch = loader.batch_sampler is not None
    again: DataLoader[Any] = DataLoader(
        loader.dataset,
        # without a batch sampler, an index may be that of a whole batch
        batch_size=1 if by_batch else None,
        batch_sampler=[some] * DRAWS if by_batch else None,
        sampler=None if by_batch else some[:1] * DRAWS,
        collate_fn=loader.collate_fn,
        num_workers=min(1, loader.num_workers),  # one, as perhaps only a worker can read the data
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=torch.Generator().manual_seed(SEED),
    )
    try:
        with kept_random_state(SEED):
            return list(again)
    except Exception:  # a collator may need other batches; the first pass shows any real error
        return []


def first_example(data: Any) -> Any:
    """An example that torch's default collation will put into batches; None if none can be read.

    Args:
        data: a Dataset, or a loader of one.
    """
    if hasattr(data, "collate_fn"):
        if data.collate_fn is not default_collate or not reads_by_index(data):
            return None
        data = data.dataset
    if type(data) is TensorDataset or not hasattr(data, "__getitem__"):
        return None
    try:
        with kept_random_state(SEED):
            return data[0]
    except Exception:  # an empty data set or other indices: the first pass shows any real error
        return None


def _some_indices(loader: "DataLoader[Any]") -> list[Any]:
    """Indices from all over the data; those of the first batch for a custom batch sampler."""
    batches = loader.batch_sampler
    if batches is not None and type(batches) is not BatchSampler:
        return first_indices(batches, batch=True)
    listed: Sequence[Any] = first_indices(loader.sampler if batches is None else batches.sampler)
    if len(listed) == LISTED and listed == list(range(LISTED)):
        listed = range(loader_length(loader.dataset) or LISTED)
    ends = torch.linspace(0, len(listed) - 1, EXAMPLES).round().long().unique().tolist()
    return [listed[index] for index in ends] if len(listed) else []
