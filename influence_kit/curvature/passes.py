"""Passes over a data set: batches with their indices, gradients kept from one to the next."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from influence_kit.core.distributed import is_mine
from influence_kit.core.memory import resident_bytes
from influence_kit.data.batches import Batch, example_count, take, to_device
from influence_kit.errors import InvalidArgumentError, NonFiniteError
from influence_kit.gradients.per_example import Gradients
from influence_kit.operators.wording import OF_CURVATURE

Features = Callable[[Tensor, Batch], Gradients]


class Spread:
    """Examples evenly from all over a data set, taken as its batches go by.

    They are the same ones whatever the batches: those at multiples of a power of two, ``most`` to
    twice as many of them (all of fewer).
    """

    def __init__(self, most: int) -> None:
        self.most, self._every = most, 1
        self.taken: list[tuple[Tensor, Batch]] = []

    def add(self, indices: Tensor, batch: Batch) -> None:
        """Take those of a batch."""
        self.taken += self._some(indices, batch)
        while sum(len(own) for own, _ in self.taken) > 2 * self.most:
            self._every *= 2
            self.taken = [part for own in self.taken for part in self._some(*own)]

    def _some(self, indices: Tensor, batch: Batch) -> list[tuple[Tensor, Batch]]:
        rows = (indices % self._every == 0).nonzero()[:, 0]
        return [(indices[rows], take(batch, rows))] if len(rows) else []


@dataclass
class DataSet:
    """Batches that are read again and again.

    Args:
        batches: the batches, in a fixed order.
        device: where they are wanted.
        checkpoint: the number of the checkpoint that is in the model.
        name: what to call the data in an error.
        some: how many examples ``sample`` gives, to twice as many.
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
        """The same, of the batches that this rank computes."""
        return (item for number, item in enumerate(self) if is_mine(number))

    @property
    def count(self) -> int:
        """The letter n: known after a pass, which it takes where there was none."""
        self._pass_once()
        assert self._count is not None
        return self._count

    @property
    def sample(self) -> list[tuple[Tensor, Batch]]:
        """Batches of examples from all over the data, with their indices; likewise."""
        self._pass_once()
        assert self._spread is not None
        return self._spread.taken

    def _pass_once(self) -> None:
        if self._count is None:
            for _ in self:
                pass


def refuse_non_finite(measured: Tensor) -> Tensor:
    """What was measured of a data set, where all of it is finite."""
    if not torch.isfinite(measured.sum()):
        raise NonFiniteError(
            "the curvature is NaN or infinite: some example of `hessian_dataset` has a loss or "
            "gradient that is not finite at this checkpoint (a target out of range, log(0), an "
            "overflow); `TracInCP(...).self_influence()` names it"
        )
    return measured


@dataclass
class Memory:
    """Gradients of batches, kept for later passes while memory lasts: those of one source."""

    owner: object = None
    left: int = 0
    kept: dict[tuple[int, int], Gradients] = field(default_factory=dict)

    def of(self, owner: object, device: torch.device) -> dict[tuple[int, int], Gradients]:
        """What is kept of a source; anything of another is dropped."""
        if self.owner is not owner:
            self.clear()
            self.owner, self.left = owner, resident_bytes(device)
        return self.kept

    def clear(self) -> None:
        """Free what is kept."""
        self.owner = None
        self.kept.clear()


@dataclass
class Remembered:
    """Features that are computed once for several passes over the same data.

    Args:
        features: gradients of a batch, given the indices of its examples.
        memory: where they are kept.
    """

    features: Features
    memory: Memory

    def __call__(self, indices: Tensor, batch: Batch) -> Gradients:
        """The features of a batch; kept where its examples stand one after the other."""
        kept = self.memory.of(self, indices.device)
        ends = int(indices[0]), int(indices[-1])
        if not bool((indices.diff() == 1).all()):  # a sample, which will not come again
            return self.features(indices, batch)
        if ends not in kept:
            gradients = self.features(indices, batch)
            if gradients.nbytes > self.memory.left:
                return gradients
            self.memory.left -= gradients.nbytes
            kept[ends] = gradients
        return kept[ends]
