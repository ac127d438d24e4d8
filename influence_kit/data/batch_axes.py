"""Which dimension of each tensor of a batch counts examples: determined once per data source.

A tensor of a batch holds one row per example in its first dimension, or in another one (time-first
sequences ``[t, n, d]``), or belongs to the whole batch (class weights, an epoch number). One batch
often does not show which: the number of examples may equal the number of time steps. ``BatchAxes``
compares batches of several sizes, and marks each batch with the dimensions that it found.

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

from influence_kit.core.arguments import shown
from influence_kit.data.axis_search import (
    given_axes,
    grows,
    in_lists,
    label_leaf,
    likely_axes,
    structure_of,
    with_one_less,
)
from influence_kit.data.marked_batch import Axes, Known, describe, known, leaves, shape_of
from influence_kit.errors import InvalidArgumentError, PassAgain

# how many different shapes of batches are compared; later ones are only checked
MOST_SHAPES = 32
# how many batches are read ahead, until one shows which dimensions count examples
READ_AHEAD = 8


@dataclass
class _Seen:
    """The shapes of batches of one structure, their known example counts, and the axes inferred."""

    shapes: list[tuple[tuple[int, ...], ...]] = field(default_factory=list)
    counts: list[int | None] = field(default_factory=list)
    # the possible readings of these shapes, the likeliest first; then the readings in which one
    # more leaf belongs to the whole batch, and has the batch's length by chance
    ways: list[Axes] = field(default_factory=list)
    last_resorts: list[Axes] = field(default_factory=list)
    taken: int = 0

    @property
    def axes(self) -> Axes | None:
        """The reading in use."""
        ways = [*self.ways, *self.last_resorts]
        return ways[self.taken] if ways else None


class BatchAxes:
    """Finds the axis of the examples in each leaf of batches.

    Args:
        given: the user's axes: an axis or None per leaf, in the structure of the batch (a tuple,
            list or dict; one entry may stand for all leaves of an item). The axes of dict keys that
            are left out are inferred.
    """

    def __init__(self, given: Any = None) -> None:
        self._given = given
        self._seen: dict[Any, _Seen] = {}
        # whether earlier batches were marked with other axes than they would be now
        self._has_learnt_better = False

    @property
    def is_inferred(self) -> bool:
        """Whether the user gave no axes, so that all are inferred."""
        return self._given is None

    def mark(self, batch: Any, count: int | None = None) -> Known:
        """The batch, with the axis of each leaf.

        Args:
            batch: a tuple, list or dict.
            count: the number of its examples, if the loader determines it.

        Raises:
            PassAgain: if earlier batches were read with other axes.
            InvalidArgumentError: for a batch in which no dimension counts examples.
        """
        if isinstance(batch, Known):
            return batch
        if not isinstance(batch, tuple | list | Mapping | Tensor):
            raise InvalidArgumentError(
                "a batch must be a tuple or list `(*model_inputs, targets)`, or a dict of tensors; "
                f"got {shown(batch)}"
            )
        count = in_lists(batch) if count is None and self.is_inferred else count
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
                f"a batch of shapes {_listed(shapes)} shows that earlier batches have their "
                "examples in other dimensions than those used"
            )
        # a batch in which no dimension counts examples is one example, if all of its kind are
        n = count if count is not None else max(lengths, default=int(set(seen.counts) >= {1}))
        if count is None and len(lengths) > 1:
            raise InvalidArgumentError(
                f"the dimensions in `batch_axes` give several numbers of examples for one batch, "
                f"{sorted(lengths)}; the batch is {describe(batch)}"
            )
        if n < 1:
            tensors = [leaf for leaf in leaves(batch) if isinstance(leaf, Tensor)]
            remedy = "Give the dimension that counts examples in each tensor as `batch_axes`"
            if not tensors:
                remedy = "Convert its arrays and lists to tensors (`torch.as_tensor`)"
            elif not any(tensor.numel() for tensor in tensors):
                remedy = "It is empty"
            raise InvalidArgumentError(
                f"a batch must hold a tensor with one row per example; got {describe(batch)}. "
                f"{remedy}"
            )
        return known(batch, n, axes)

    def is_clear(self, batch: Any) -> bool:
        """Whether the shapes of such batches so far allow only one reading."""
        if not isinstance(batch, tuple | list | Mapping):
            return True
        seen = self._seen.get(structure_of(batch))
        return seen is not None and len(seen.ways) == 1

    @property
    def are_likeliest(self) -> bool:
        """Whether the likeliest reading of all batches is used."""
        return all(seen.taken == 0 for seen in self._seen.values())

    def try_another(self) -> bool:
        """Use the next reading of batches whose shapes allow several; False once all were tried.

        After that, the likeliest reading is used again.
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
        """Collate one example 2 and 3 times: only axes that count examples differ in length."""
        dataset, collate = getattr(loader, "dataset", None), getattr(loader, "collate_fn", None)
        if not isinstance(loader, DataLoader) or isinstance(dataset, IterableDataset):
            return
        if collate is None or loader.batch_sampler is None:
            return
        try:
            item = dataset[0]  # type: ignore[index]
            batches = [collate([copy.copy(item) for _ in range(n)]) for n in (2, 3)]
        except Exception:  # the data set or function does not take such a list: use real batches
            return
        if not all(isinstance(batch, tuple | list | Mapping) for batch in batches):
            return
        shapes = [tuple(shape_of(leaf) for leaf in leaves(batch)) for batch in batches]
        # a function that uses only one example of its list shows nothing
        if structure_of(batches[0]) == structure_of(batches[1]) and grows(*shapes):
            seen = self._seen.setdefault(structure_of(batches[0]), _Seen())
            for n, some in zip((2, 3), shapes, strict=True):
                if some not in seen.shapes:
                    seen.shapes.append(some)
                    seen.counts.append(n)

    def note_stacked(self, batch: Any) -> None:
        """Note that such batches count examples in the first dimension of every leaf."""
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
        given = given_axes(self._given, batch)
        ways = (
            tuple(a if own is ... else own for a, own in zip(axes, given, strict=True))
            for axes in found
        )
        seen.ways, seen.taken = list(dict.fromkeys(ways)), 0
        seen.last_resorts = list(with_one_less(seen.shapes, seen.ways[0], label_leaf(batch), given))


def _listed(shapes: Iterable[tuple[int, ...]]) -> str:
    return ", ".join(str(list(shape)) for shape in shapes)


class Marker:
    """Marks the batches of a loader with the dimensions that count examples.

    Args:
        loader: batches, in a fixed order.
        axes: finds these dimensions.
    """

    def __init__(self, loader: Any, axes: BatchAxes) -> None:
        self.loader, self._axes = loader, axes
        self._has_learnt = False

    def read(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches of one pass, marked; some are read ahead until their axes are clear."""
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
        """A batch of the loader, marked; ``is_first``: no batch of this pass is in use yet."""
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
        """Whether torch's own function stacks examples in the first dimension of every tensor."""
        collate = getattr(self.loader, "collate_fn", None)
        return collate is default_collate and self._axes.is_inferred


def stacked(batch: Any) -> Known:
    """A batch of ``default_collate``, marked: its leaves count examples in the first dimension."""
    found = list(leaves(batch))
    n = max((shape_of(leaf)[0] for leaf in found if shape_of(leaf)), default=0)
    if n < 1:
        raise InvalidArgumentError(
            f"a batch must hold a tensor with one row per example; got {describe(batch)}"
        )
    return known(batch, n, tuple(0 if shape_of(leaf) else None for leaf in found))
