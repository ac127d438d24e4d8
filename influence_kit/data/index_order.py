"""Whether a loader gives its examples in a fixed order: its indices, listed several times.

Indices alone are read, no example is. A sampler is judged by what it does: it may be of any class.
"""

import copy
import random
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from influence_kit.core.random_states import kept_random_state

# indices that are read of each listing
LISTED = 4096
# of fewer, an order that is drawn may come out the same by chance: they are listed more often
FEW, OFTEN = 16, 16


def index_sampler(loader: object) -> Any:
    """What gives a loader's indices, or lists of them; None where there are no indices."""
    if isinstance(getattr(loader, "dataset", None), IterableDataset):
        return None
    for name in ("batch_sampler", "sampler"):
        sampler = getattr(loader, name, None)
        if isinstance(sampler, Iterable):
            return sampler
    return None


def fixed_order(sampler: Any) -> list[Any] | None:
    """The first indices that a sampler gives; None where another random state gives others.

    The sampler and the random state come back unchanged.
    """
    if isinstance(sampler, RandomSampler | SubsetRandomSampler | WeightedRandomSampler):
        return None
    inner = getattr(sampler, "sampler", None)
    if type(sampler) is BatchSampler and fixed_order(inner) is None:
        return None
    ours = _copied(sampler)
    first = _listed(ours, 0)
    times = 2 if len(first) > FEW else OFTEN
    return first if all(_listed(ours, seed) == first for seed in range(1, times)) else None


def first_indices(sampler: Any, batch: bool = False) -> list[Any]:
    """The first indices that a sampler gives, or those of its first batch."""
    ours = _copied(sampler)
    if not batch:
        return _listed(ours, 0)
    with kept_random_state(0):
        return list(flat_indices(islice(ours, 1)))


def listed_rows(loader: "DataLoader[Any]") -> int | None:
    """How many examples a loader's indices are; None where that is not known, or they are many."""
    batches = loader.batch_sampler
    if batches is None:  # an index may be that of a whole batch
        return None
    if type(batches) is not BatchSampler:
        indices = _listed(_copied(batches), 0)
        return len(indices) if len(indices) < LISTED else None
    try:
        count = len(batches.sampler)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None
    return count // batches.batch_size * batches.batch_size if batches.drop_last else count


def _listed(sampler: Any, seed: int) -> list[Any]:
    if hasattr(sampler, "set_epoch"):  # DistributedSampler: another order in each epoch
        sampler.set_epoch(seed)
    with kept_random_state(seed):
        return list(islice(flat_indices(sampler), LISTED))


def flat_indices(items: Iterable[Any]) -> Iterator[Any]:
    """The indices of an index sampler, or of one of batches."""
    for item in items:
        item = item.tolist() if hasattr(item, "tolist") else item
        if isinstance(item, list | tuple):
            yield from flat_indices(item)
        else:
            yield item


def _copied(sampler: Any) -> Any:
    """A sampler that may be iterated without moving the user's own.

    What it draws from is copied, too, but no data set: a counter of epochs and a generator of
    random numbers are then the copy's.
    """
    try:
        ours = copy.copy(sampler)
        attributes = vars(ours)
    except (TypeError, AttributeError):
        return sampler
    for name, value in list(attributes.items()):
        if name in ("sampler", "batch_sampler"):
            attributes[name] = _copied(value)
        elif _draws(value):
            attributes[name] = _copied_generator(value)
    return ours


def _draws(value: object) -> bool:
    numpy: Any = sys.modules.get("numpy")
    of_numpy = (numpy.random.Generator, numpy.random.RandomState) if numpy else ()
    return isinstance(value, (torch.Generator, random.Random, *of_numpy))


def _copied_generator(value: Any) -> Any:
    if not isinstance(value, torch.Generator):
        return copy.deepcopy(value)
    return torch.Generator(value.device).set_state(value.get_state())
