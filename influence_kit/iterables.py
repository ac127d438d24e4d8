"""Iterables that can be read only once: kept where they are short, refused where they are data."""

import types
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data.dataloader import _BaseDataLoaderIter

from influence_kit.errors import InvalidArgumentError


def reads_once(data: Any) -> bool:
    """Whether a second pass over the data would go on where the first has ended.

    True of generators, of ``iter(loader)``, ``map``, ``zip`` and the like, and of what gives one
    and the same of them to each pass. An iterator of a user's own class may begin again.
    """
    if isinstance(data, Iterator):
        own = isinstance(getattr(type(data), "__iter__", None), types.FunctionType)
        return isinstance(data, _BaseDataLoaderIter) or not own
    if isinstance(data, DataLoader):
        data = data.dataset
    if not isinstance(data, IterableDataset) and hasattr(data, "__len__"):
        return False
    if not isinstance(data, Iterable):
        return False
    with torch.random.fork_rng(devices=[]):
        first = iter(data)
        return first is iter(data) and first is not data


def refuse_one_pass(data: Any, name: str) -> None:
    """Refuse data that can be read only once.

    Raises:
        InvalidArgumentError: for such data, with what to pass.
    """
    if reads_once(data):
        raise InvalidArgumentError(
            f"`{name}` is read again and again, and what was given ({type(data).__name__}) can be "
            "read only once: pass a Dataset, a list of examples, or a DataLoader; of a generator "
            "function an object whose `__iter__` calls it"
        )


class KeptBatches:
    """Batches that were read from an iterable once, to be read again.

    Args:
        batches: the iterable.
        name: what to call it in an error.

    Raises:
        InvalidArgumentError: where there are none (left).
    """

    def __init__(self, batches: Iterable[Any], name: str) -> None:
        self._batches = list(batches)
        if not self._batches:
            raise InvalidArgumentError(
                f"`{name}` holds no examples: a {type(batches).__name__} can be read only once, "
                "and this one has nothing (left); make it again for each call, or pass a "
                "DataLoader"
            )

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)


def readable_again(inputs: Any, name: str = "inputs") -> Any:
    """The same inputs; kept in memory where they could be read only once."""
    return KeptBatches(inputs, name) if reads_once(inputs) else inputs
