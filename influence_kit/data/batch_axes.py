"""Where the examples stand in each tensor of a batch: settled once for a data source, and kept.

A tensor of a batch holds one row per example in its first dimension, or in another one (time-first
sequences ``[t, n, d]``), or belongs to the whole batch (class weights, an epoch number). One batch
often does not show which: as many examples as time steps look alike. ``BatchAxes`` compares batches
of several sizes, and marks each batch with what it found.

Shapes: n examples of a batch.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate

from influence_kit.data.axis_search import (
    grows,
    in_lists,
    label_leaf,
    likely_axes,
    said_of_leaves,
    structure_of,
    with_one_less,
)
from influence_kit.data.marked_batch import Axes, Known, describe, known, leaves, shape_of
from influence_kit.errors import InvalidArgumentError, PassAgain

# different shapes of batches that are compared; later ones are only checked
MOST_SHAPES = 32
# batches that are read ahead, until one shows where examples stand
READ_AHEAD = 8


@dataclass
class _Seen:
    """The shapes of batches of one structure, the counts that are sure, and the axes they show."""

    shapes: list[tuple[tuple[int, ...], ...]] = field(default_factory=list)
    counts: list[int | None] = field(default_factory=list)
    # the ways to read these shapes, where they leave a choice, the likeliest first; then those with
    # one leaf more that belongs to the whole batch, if only by chance as long as it
    ways: list[Axes] = field(default_factory=list)
    last_resorts: list[Axes] = field(default_factory=list)
    taken: int = 0

    @property
    def axes(self) -> Axes | None:
        """The way that is taken."""
        ways = [*self.ways, *self.last_resorts]
        return ways[self.taken] if ways else None


class BatchAxes:
    """Finds the axis of the examples in each leaf of batches.

    Args:
        given: what the user says: an axis or None for a leaf, in the structure of the batch (a
            tuple, list or dict; one entry may stand for all leaves of an item). Keys of a dict that
            are not named are found.
    """

    def __init__(self, given: Any = None) -> None:
        self._given = given
        self._seen: dict[Any, _Seen] = {}
        # whether some batches were marked in another way than they would be now
        self._has_learnt_better = False

    @property
    def nothing_said(self) -> bool:
        """Whether the user said nothing."""
        return self._given is None

    def mark(self, batch: Any, count: int | None = None) -> Known:
        """The batch, with the axis of each leaf.

        Args:
            batch: a tuple, list or dict.
            count: the number of its examples, where the loader tells it.

        Raises:
            PassAgain: where batches before were read in another way.
            InvalidArgumentError: for a batch in which nothing counts examples.
        """
        if isinstance(batch, Known):
            return batch
        count = in_lists(batch) if count is None and self.nothing_said else count
        seen = self._seen.setdefault(structure_of(batch), _Seen())
        shapes: tuple[tuple[int, ...], ...] = tuple(shape_of(leaf) for leaf in leaves(batch))
        before = seen.axes
        is_new = shapes not in seen.shapes and len(seen.shapes) < MOST_SHAPES
        if is_new or before is None:
            self._add(seen, batch, shapes, count)
        axes = seen.axes
        assert axes is not None
        lengths = {
            shape_of(leaf)[a]
            for leaf, a in zip(leaves(batch), axes, strict=True)
            if a is not None and isinstance(leaf, Tensor)
        }
        if len(lengths) > 1 and len(seen.shapes) >= MOST_SHAPES:
            self._add(seen, batch, shapes, count)
            axes = seen.axes or axes
        if before is not None and before != axes:
            self._has_learnt_better = True
            raise PassAgain(
                f"a batch of shapes {_listed(shapes)} shows that the examples of the batches "
                "before stood elsewhere than it seemed"
            )
        # a batch in which nothing counts examples is one, where all of its kind are
        n = count if count is not None else max(lengths, default=int(set(seen.counts) >= {1}))
        if count is None and len(lengths) > 1:
            raise InvalidArgumentError(
                f"`batch_axes` says that the examples of a batch are as many as {sorted(lengths)} "
                f"at once; it holds {describe(batch)}"
            )
        if n < 1:
            tensors = [leaf for leaf in leaves(batch) if isinstance(leaf, Tensor)]
            remedy = "Name the dimension of each tensor's examples in `batch_axes`"
            if not tensors:
                remedy = "Make tensors of its arrays and lists (`torch.as_tensor`)"
            elif not any(tensor.numel() for tensor in tensors):
                remedy = "It is empty"
            raise InvalidArgumentError(
                f"a batch must hold a tensor with one row per example; got {describe(batch)}. "
                f"{remedy}"
            )
        return known(batch, n, axes)

    def is_clear(self, batch: Any) -> bool:
        """Whether the shapes of such batches so far leave no choice."""
        if not isinstance(batch, tuple | list | Mapping):
            return True
        seen = self._seen.get(structure_of(batch))
        return seen is not None and len(seen.ways) == 1

    def try_another(self) -> bool:
        """Read batches whose shapes leave a choice in the next way; False where all were tried.

        Then they are read in the likeliest way again.
        """
        if self._has_learnt_better:
            self._has_learnt_better = False
            return True
        for seen in self._seen.values():
            if seen.taken + 1 < len(seen.ways) + len(seen.last_resorts):
                seen.taken += 1
                return True
        for seen in self._seen.values():
            seen.taken = 0
        return False

    def learn(self, loader: Any) -> None:
        """See two batches of one example repeated, which tell an axis of examples from others."""
        dataset, collate = getattr(loader, "dataset", None), getattr(loader, "collate_fn", None)
        if not isinstance(loader, DataLoader) or isinstance(dataset, IterableDataset):
            return
        if collate is None or loader.batch_sampler is None:
            return
        try:
            item = dataset[0]  # type: ignore[index]
            batches = [collate([copy.copy(item) for _ in range(n)]) for n in (2, 3)]
        except Exception:  # a data set or function that takes no such list: real batches will tell
            return
        if not all(isinstance(batch, tuple | list | Mapping) for batch in batches):
            return
        shapes = [tuple(shape_of(leaf) for leaf in leaves(batch)) for batch in batches]
        # a function that takes one example of its list tells nothing
        if structure_of(batches[0]) == structure_of(batches[1]) and grows(*shapes):
            seen = self._seen.setdefault(structure_of(batches[0]), _Seen())
            for n, some in zip((2, 3), shapes, strict=True):
                if some not in seen.shapes:
                    seen.shapes.append(some)
                    seen.counts.append(n)

    def note_stacked(self, batch: Any) -> None:
        """Batches of this structure have their examples in front of every leaf."""
        seen = self._seen.setdefault(structure_of(batch), _Seen())
        if seen.counts[:2] == [2, 3]:
            return
        shapes = [shape_of(leaf) for leaf in leaves(batch)]
        for n in (3, 2):
            seen.shapes.insert(0, tuple((n, *shape[1:]) if shape else () for shape in shapes))
            seen.counts.insert(0, n)
        seen.ways, seen.last_resorts = [tuple(0 if shape else None for shape in shapes)], []
        seen.taken = 0

    def _add(
        self, seen: _Seen, batch: Any, shapes: tuple[tuple[int, ...], ...], count: int | None
    ) -> None:
        seen.shapes.append(shapes)
        seen.counts.append(count)
        found = likely_axes(seen.shapes, seen.counts, label_leaf(batch))
        said = said_of_leaves(self._given, batch)
        ways = (
            tuple(a if own is ... else own for a, own in zip(axes, said, strict=True))
            for axes in found
        )
        seen.ways, seen.taken = list(dict.fromkeys(ways)), 0
        seen.last_resorts = list(with_one_less(seen.shapes, seen.ways[0], label_leaf(batch), said))


def _listed(shapes: Iterable[tuple[int, ...]]) -> str:
    return ", ".join(str(list(shape)) for shape in shapes)


class Marker:
    """Marks the batches of a loader with where their examples stand.

    Args:
        loader: batches, in a fixed order.
        axes: finds where the examples stand.
    """

    def __init__(self, loader: Any, axes: BatchAxes) -> None:
        self.loader, self._axes = loader, axes
        self._has_learnt = False

    def read(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches of one pass, marked; some are read ahead until it is clear how."""
        if not self._has_learnt and not self._stacks:
            self._axes.learn(self.loader)
        self._has_learnt = True
        ahead: list[Any] = []
        for batch in batches:
            self.marked(batch, is_first=True)
            ahead.append(batch)
            if self._stacks or len(ahead) == READ_AHEAD or self._axes.is_clear(batch):
                break
        for batch in chain(ahead, batches):
            yield self.marked(batch)

    def marked(self, batch: Any, is_first: bool = False) -> Any:
        """A batch of the loader, marked; before the first no other was read."""
        if not isinstance(batch, tuple | list | Mapping):
            return batch
        if self._stacks:
            self._axes.note_stacked(batch)
            return stacked(batch)
        count = 1 if getattr(self.loader, "batch_size", None) == 1 else None
        try:
            return self._axes.mark(batch, count)
        except PassAgain:
            if is_first:
                return self._axes.mark(batch, count)
            raise

    @property
    def _stacks(self) -> bool:
        """Whether examples are stacked by torch's own function, in front of every tensor."""
        collate = getattr(self.loader, "collate_fn", None)
        return collate is default_collate and self._axes.nothing_said


def stacked(batch: Any) -> Known:
    """A batch of ``default_collate``, all of whose leaves have the examples in front."""
    found = list(leaves(batch))
    n = max((shape_of(leaf)[0] for leaf in found if shape_of(leaf)), default=0)
    if n < 1:
        raise InvalidArgumentError(
            f"a batch must hold a tensor with one row per example; got {describe(batch)}"
        )
    return known(batch, n, tuple(0 if shape_of(leaf) else None for leaf in found))
