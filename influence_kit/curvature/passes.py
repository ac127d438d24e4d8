"""Passes over a data set: batches with their indices, gradients cached between passes."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from influence_kit.core.distributed import is_mine
from influence_kit.core.memory import resident_bytes
from influence_kit.curvature.wording import OF_CURVATURE
from influence_kit.data.batches import Batch, example_count, take, to_device
from influence_kit.errors import InvalidArgumentError, NonFiniteError
from influence_kit.gradients.per_example import Gradients

Features = Callable[[Tensor, Batch], Gradients]


class Spread:
    """A sample of examples spread evenly over a data set, collected during a pass.

    The sample is the same for any batches: indices that are multiples of a power of two, ``most``
    to twice as many of them (all examples of a smaller data set).
    """

    def __init__(self, most: int) -> None:
        self.most, self._every = most, 1
        self.taken: list[tuple[Tensor, Batch]] = []

    def add(self, indices: Tensor, batch: Batch) -> None:
        """Add the sampled examples of a batch."""
        self.taken += self._some(indices, batch)
        while sum(len(own) for own, _ in self.taken) > 2 * self.most:
            self._every *= 2
            self.taken = [part for own in self.taken for part in self._some(*own)]

    def _some(self, indices: Tensor, batch: Batch) -> list[tuple[Tensor, Batch]]:
        rows = (indices % self._every == 0).nonzero()[:, 0]
        return [(indices[rows], take(batch, rows))] if len(rows) else []


@dataclass
class DataSet:
    """Batches that are read in several passes.

    Args:
        batches: the batches, in a fixed order.
        device: the device to which batches are moved.
        checkpoint: the index of the checkpoint that is in the model.
        name: the name of the data in errors.
        some: the number of examples in ``sample``, up to twice as many.
    """

    batches: Iterable[Batch]
    device: torch.device
    checkpoint: int = 0
    name: str = OF_CURVATURE.data
    some: int = 1
    _count: int | None = None
    _spread: Spread | None = None

    def __iter__(self) -> Iterator[tuple[Tensor, Batch]]:
        """Each batch, with the indices of its examples ``[n]``."""
        start, spread = 0, Spread(self.some) if self._spread is None else None
        for batch in self.batches:
            n = example_count(batch)
            indices = torch.arange(start, start + n, device=self.device)
            moved = to_device(batch, self.device)
            if spread is not None:
                spread.add(indices, moved)
            yield indices, moved
            start += n
        if start == 0:
            raise InvalidArgumentError(f"there are no examples: {self.name} is empty")
        self._count, self._spread = start, self._spread or spread

    def first(self) -> Batch:
        """The first batch."""
        return next(iter(self))[1]

    def of_this_rank(self) -> Iterator[tuple[Tensor, Batch]]:
        """The same, for the batches that this rank computes."""
        return (item for number, item in enumerate(self) if is_mine(number))

    @property
    def count(self) -> int:
        """The number of examples; takes a pass if there was none."""
        self._pass_once()
        assert self._count is not None
        return self._count

    @property
    def sample(self) -> list[tuple[Tensor, Batch]]:
        """Examples spread over the data, in batches with their indices; likewise."""
        self._pass_once()
        assert self._spread is not None
        return self._spread.taken

    def _pass_once(self) -> None:
        if self._count is None:
            for _ in self:
                pass


def refuse_non_finite(statistic: Tensor) -> Tensor:
    """A statistic of a data set; an error if an entry is not finite."""
    if not torch.isfinite(statistic.sum()):
        raise NonFiniteError(
            "the curvature is NaN or infinite: some example of `hessian_dataset` has a loss or "
            "gradient that is not finite at this checkpoint (a target out of range, log(0), an "
            "overflow); `TracInCP(...).self_influence()` names it"
        )
    return statistic


@dataclass
class Memory:
    """Gradients of batches of one source, cached for later passes while memory lasts."""

    owner: object = None
    left: int = 0
    kept: dict[tuple[int, int], Gradients] = field(default_factory=dict)

    def of(self, owner: object, device: torch.device) -> dict[tuple[int, int], Gradients]:
        """The cached gradients of a source; those of another are dropped."""
        if self.owner is not owner:
            self.clear()
            self.owner, self.left = owner, resident_bytes(device)
        return self.kept

    def clear(self) -> None:
        """Drop the cached gradients."""
        self.owner = None
        self.kept.clear()


@dataclass
class Remembered:
    """Features that are computed once for several passes over the same data.

    Args:
        features: returns the gradients of a batch, given the indices of its examples.
        memory: the cache.
    """

    features: Features
    memory: Memory

    def __call__(self, indices: Tensor, batch: Batch) -> Gradients:
        """The features of a batch; cached if its indices are consecutive."""
        kept = self.memory.of(self, indices.device)
        ends = int(indices[0]), int(indices[-1])
        if not bool((indices.diff() == 1).all()):  # a sample, which is read once
            return self.features(indices, batch)
        if ends not in kept:
            gradients = self.features(indices, batch)
            if gradients.nbytes > self.memory.left:
                return gradients
            self.memory.left -= gradients.nbytes
            kept[ends] = gradients
        return kept[ends]
