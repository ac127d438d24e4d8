"""Passes over a data set: batches with their places, gradients kept from one to the next."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from influence_kit.data import Batch, example_count, take, to_device
from influence_kit.distributed import is_mine
from influence_kit.errors import InvalidArgumentError, NonFiniteError
from influence_kit.gradients.per_example import Gradients
from influence_kit.memory import resident_bytes
from influence_kit.operators.wording import OF_CURVATURE

Features = Callable[[Tensor, Batch], Gradients]


@dataclass
class DataSet:
    """Batches that are read again and again.

    Args:
        batches: the batches, in a fixed order.
        device: where they are wanted.
        checkpoint: the number of the checkpoint that is in the model.
        name: what to call the data in an error.
    """

    batches: Iterable[Batch]
    device: torch.device
    checkpoint: int = 0
    name: str = OF_CURVATURE.data
    _count: int | None = None

    def __iter__(self) -> Iterator[tuple[Tensor, Batch]]:
        """Each batch, with the places of its examples ``[n]``."""
        start = 0
        for batch in self.batches:
            n = example_count(batch)
            yield torch.arange(start, start + n, device=self.device), to_device(batch, self.device)
            start += n
        if start == 0:
            raise InvalidArgumentError(f"there are no examples: {self.name} is empty")
        self._count = start

    def first(self) -> Batch:
        """The first batch."""
        return next(iter(self))[1]

    def of_this_rank(self) -> Iterator[tuple[Tensor, Batch]]:
        """The same, of the batches that this rank computes."""
        return (item for number, item in enumerate(self) if is_mine(number))

    @property
    def count(self) -> int:
        """The letter n: known after a pass, which it takes where there was none."""
        if self._count is None:
            for _ in self:
                pass
        assert self._count is not None
        return self._count


class Spread:
    """Some examples from all over a data set, taken as its batches go by.

    Args:
        most: how many.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._taken: list[tuple[Tensor, Batch]] = []
        self._every, self._seen = 1, 0

    def add(self, places: Tensor, batch: Batch) -> None:
        """Take some examples of a batch, unless there are enough batches already."""
        if self._seen % self._every == 0:
            self._taken.append(self._some(places, batch, self.most))
        self._seen += 1
        if len(self._taken) > self.most // 2:
            self._taken, self._every = self._taken[::2], 2 * self._every

    def examples(self) -> Iterator[tuple[Tensor, Batch]]:
        """Their indices and batches, as many of each."""
        each = self.most // max(1, len(self._taken))
        return (self._some(places, batch, each) for places, batch in self._taken)

    @staticmethod
    def _some(places: Tensor, batch: Batch, count: int) -> tuple[Tensor, Batch]:
        rows = torch.linspace(0, len(places) - 1, min(count, len(places))).round().long()
        return places[rows.to(places.device)], take(batch, rows)


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
        features: gradients of a batch, given the places of its examples.
        memory: where they are kept.
    """

    features: Features
    memory: Memory

    def __call__(self, places: Tensor, batch: Batch) -> Gradients:
        """The features of a batch; kept where its examples stand one after the other."""
        kept = self.memory.of(self, places.device)
        ends = int(places[0]), int(places[-1])
        if not bool((places.diff() == 1).all()):  # a sample, which will not come again
            return self.features(places, batch)
        if ends not in kept:
            gradients = self.features(places, batch)
            if gradients.nbytes > self.memory.left:
                return gradients
            self.memory.left -= gradients.nbytes
            kept[ends] = gradients
        return kept[ends]
