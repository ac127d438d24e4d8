"""Whether a loader gives its examples in a fixed order: its indices are listed several times.

Only indices are read, and no examples. A sampler of any class is judged by the indices that it
gives.
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

# how many indices are read in each listing
LISTED = 4096
# a random order of at most FEW indices may repeat by chance: it is listed OFTEN times
FEW, OFTEN = 16, 16


def index_sampler(loader: object) -> Any:
    """The object that gives a loader's indices, or lists of them; None if it has no indices."""
    if isinstance(getattr(loader, "dataset", None), IterableDataset):
        return None
    for name in ("batch_sampler", "sampler"):
        sampler = getattr(loader, name, None)
        if isinstance(sampler, Iterable):
            return sampler
    return None


def fixed_order(sampler: Any) -> list[Any] | None:
    """The first indices that a sampler gives; None if they depend on the random state.

    The sampler and the random state are left unchanged.
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
    """The number of examples that a loader's indices give; None if unknown, or above ``LISTED``."""
    batches = loader.batch_sampler
    if batches is None:  # then an index may be that of a whole batch
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
    if hasattr(sampler, "set_epoch"):  # DistributedSampler: a new order in each epoch
        sampler.set_epoch(seed)
    with kept_random_state(seed):
        return list(islice(flat_indices(sampler), LISTED))


def flat_indices(items: Iterable[Any]) -> Iterator[Any]:
    """The indices of a sampler, or of a batch sampler."""
    for item in items:
        item = item.tolist() if hasattr(item, "tolist") else item
        if isinstance(item, list | tuple):
            yield from flat_indices(item)
        else:
            yield item


def _copied(sampler: Any) -> Any:
    """A copy of a sampler, which can be iterated without advancing the user's own.

    Inner samplers and random generators are copied, too, but no data set: an epoch counter and a
    generator then belong to the copy.
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
