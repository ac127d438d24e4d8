"""Iterables that can be read only once: kept where they are short, refused where they are data."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from influence_kit.errors import InvalidArgumentError


def reads_once(data: Any) -> bool:
    """Whether a second pass over the data would go on where the first has ended.

    True of iterators: generators, ``iter(loader)``, ``map``, ``zip`` and objects with ``__next__``
    (were they to begin again at ``iter``, they would also in the middle of another pass); and of
    an ``IterableDataset`` that gives one and the same of them to each pass.
    """
    if isinstance(data, Iterator):
        return True
    if isinstance(data, DataLoader):
        # each worker has the data set for itself
        data = data.dataset if data.num_workers == 0 else None
    if not isinstance(data, IterableDataset):
        return False
    if isinstance(data, Iterator):
        return True
    with torch.random.fork_rng(devices=[]):
        return iter(data) is iter(data)


def refuse_one_pass(data: Any, name: str) -> None:
    """Refuse data that can be read only once.

    Raises:
        InvalidArgumentError: for such data, with what to pass.
    """
    if reads_once(data):
        raise InvalidArgumentError(
            f"`{name}` is read again and again, and what was given ({type(data).__name__}) can be "
            "read only once: pass a Dataset, a list of examples, a DataLoader, or an object whose "
            "`__iter__` returns a new iterator each time"
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
