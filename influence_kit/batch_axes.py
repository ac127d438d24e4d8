"""Where the examples stand in each tensor of a batch: settled once for a data source, and kept.

A tensor of a batch holds one row per example in its first dimension, or in another one (time-first
sequences ``[t, n, d]``), or belongs to the whole batch (class weights, an epoch number). One batch
often does not show which: as many examples as time steps look alike. ``BatchAxes`` compares batches
of several sizes, and marks each batch with what it found.

Shapes: n examples of a batch.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice, product
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import DataLoader, IterableDataset, default_collate

from influence_kit.errors import InvalidArgumentError, PassAgain

Axes = tuple[int | None, ...]
# of a dict batch, in this order
LABEL_KEYS = ("labels", "label", "targets", "target", "y")
# different shapes of batches that are compared; later ones are only checked
MOST_SHAPES = 32
MOST_CHOICES = 16
# batches that are read ahead, until one shows where examples stand
READ_AHEAD = 8


def leaves(item: Any) -> Iterator[Any]:
    """The tensors of nested tuples, lists and dicts, and the lists without tensors, in order."""
    if isinstance(item, PackedSequence):  # its rows are no examples, and it cannot be cut
        return
    if isinstance(item, Tensor):
        yield item
    elif isinstance(item, Mapping):
        for value in item.values():
            yield from leaves(value)
    elif isinstance(item, tuple | list):
        if not item or holds_tensor(item):
            for value in item:
                yield from leaves(value)
        else:
            yield item


def holds_tensor(item: Any) -> bool:
    """Whether there is a tensor in nested tuples, lists and dicts."""
    if isinstance(item, Mapping):
        return any(holds_tensor(value) for value in item.values())
    if isinstance(item, tuple | list):
        return any(holds_tensor(value) for value in item)
    return isinstance(item, Tensor)


def shape_of(leaf: Any) -> tuple[int, ...]:
    """The lengths that may count examples: a tensor's shape, or a list's length."""
    return tuple(leaf.shape) if isinstance(leaf, Tensor) else (len(leaf),)


class KnownTuple(tuple[Any, ...]):
    """A tuple batch ``(*model_inputs, targets)`` whose axes of examples are known."""

    n: int
    axes: Axes

    @property
    def given(self) -> tuple[Any, ...]:
        """The items."""
        return tuple(self)


class KnownDict(Mapping[str, Any]):
    """A dict batch whose axes of examples are known; ``given`` is the user's own mapping."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.given = given
        self.n: int
        self.axes: Axes

    def __getitem__(self, key: str) -> Any:
        return self.given[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.given)

    def __len__(self) -> int:
        return len(self.given)


Known = KnownTuple | KnownDict


def known(items: Any, n: int, axes: Axes) -> Known:
    """A batch of n examples, marked with where they stand in each leaf."""
    batch: Known = KnownDict(items) if isinstance(items, Mapping) else KnownTuple(items)
    batch.n, batch.axes = n, axes
    return batch


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
        count = _in_lists(batch) if count is None and self.nothing_said else count
        seen = self._seen.setdefault(_structure(batch), _Seen())
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
            raise InvalidArgumentError(
                f"a batch must hold a tensor with one row per example; got {describe(batch)}. Name "
                "the dimension of each tensor's examples in `batch_axes`"
            )
        return known(batch, n, axes)

    def is_clear(self, batch: Any) -> bool:
        """Whether the shapes of such batches so far leave no choice."""
        if not isinstance(batch, tuple | list | Mapping):
            return True
        seen = self._seen.get(_structure(batch))
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
        for n, batch in zip((2, 3), batches, strict=True):
            if isinstance(batch, tuple | list | Mapping) and _lengths_hold(batch, n):
                shapes = tuple(shape_of(leaf) for leaf in leaves(batch))
                seen = self._seen.setdefault(_structure(batch), _Seen())
                if shapes not in seen.shapes:
                    seen.shapes.append(shapes)
                    seen.counts.append(n)

    def note_stacked(self, batch: Any) -> None:
        """Batches of this structure have their examples in front of every leaf."""
        seen = self._seen.setdefault(_structure(batch), _Seen())
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
        found = _axes(seen.shapes, seen.counts, _label_leaf(batch))
        said = _said(self._given, batch)
        ways = (
            tuple(a if own is ... else own for a, own in zip(axes, said, strict=True))
            for axes in found
        )
        seen.ways, seen.taken = list(dict.fromkeys(ways)), 0
        seen.last_resorts = list(_with_one_less(seen, _label_leaf(batch), said))


def _in_lists(batch: Any) -> int | None:
    """1 for a batch whose targets are a list of one dict (boxes and their labels, say).

    Raises:
        InvalidArgumentError: where they are a list of several: no dimension counts them.
    """
    if isinstance(batch, Mapping):
        targets = next((batch[key] for key in LABEL_KEYS if key in batch), None)
    else:
        targets = batch[-1] if batch else None
    if not isinstance(targets, tuple | list) or not targets:
        return None
    if not all(isinstance(target, Mapping) and holds_tensor(target) for target in targets):
        return None
    if len(targets) > 1:
        raise InvalidArgumentError(
            f"the targets of a batch are a list of {len(targets)} dicts, one per example, and "
            f"such a batch, {describe(batch)}, cannot be cut into examples: use batches of one "
            "example (batch_size=1, or a loader of them)"
        )
    return 1


def _lengths_hold(batch: Any, n: int) -> bool:
    """Whether some leaf of a batch of n examples has that length."""
    return any(n in shape_of(leaf) for leaf in leaves(batch))


def _structure(item: Any) -> Any:
    """What batches of one kind share: nesting, keys, and the number of dimensions of tensors."""
    if isinstance(item, Mapping):
        return ("dict", *((key, _structure(value)) for key, value in item.items()))
    if isinstance(item, tuple | list) and not isinstance(item, PackedSequence):
        return tuple(_structure(value) for value in item) if holds_tensor(item) else "list"
    return item.dim() if isinstance(item, Tensor) else type(item).__name__


def _label_leaf(batch: Any) -> int | None:
    """The leaf that most likely has one row per example: the first of the targets."""
    if isinstance(batch, Mapping):
        before = 0
        for key, value in batch.items():
            found = [leaf for leaf in leaves(value) if shape_of(leaf)]
            if key in LABEL_KEYS and found:
                return before
            before += len(list(leaves(value)))
        return None
    items, first = list(batch), len(list(leaves(batch)))
    for item in items[::-1]:
        own = list(leaves(item))
        first -= len(own)
        for place, leaf in enumerate(own):
            if isinstance(leaf, Tensor) and shape_of(leaf):
                return first + place
    return None


def _axes(
    shapes: Sequence[tuple[tuple[int, ...], ...]], counts: Sequence[int | None], label: int | None
) -> list[Axes]:
    """The axis of each leaf whose lengths are, in all batches, those that count the examples.

    The likeliest choice first, where several axes have these lengths.
    """
    lengths: dict[tuple[int, int], tuple[int, ...]] = {}
    for leaf, first in enumerate(shapes[0]):
        for axis in range(len(first)):
            lengths[leaf, axis] = tuple(some[leaf][axis] for some in shapes)
    fitting = {
        vector
        for vector in lengths.values()
        if all(count in (None, length) for count, length in zip(counts, vector, strict=True))
    }
    if not fitting:
        return [(None,) * len(shapes[0])]

    def likelihood(vector: tuple[int, ...]) -> tuple[float, int]:
        having = {leaf for (leaf, _), other in lengths.items() if other == vector}
        in_front = {leaf for leaf in having if lengths.get((leaf, 0)) == vector}
        votes = len(having) + len(in_front) + 0.5 * (len(set(vector)) > 1)
        # targets almost always have their examples in front
        votes += (100 if _is_only_clue(counts) else 1.5) * (label in in_front)
        return votes, max(len(shapes[0][leaf]) for leaf in having)

    best = max(fitting, key=likelihood)
    choices: list[list[int | None]] = [
        [a for a in range(len(shape)) if lengths[leaf, a] == best] or [None]
        for leaf, shape in enumerate(shapes[0])
    ]
    if best == (1,) * len(shapes):  # one example is not cut
        choices = [choice[:1] for choice in choices]
    return list(islice(product(*choices), MOST_CHOICES))


def _with_one_less(seen: _Seen, label: int | None, said: Sequence[Any]) -> Iterator[Axes]:
    """The axes with one leaf as long as the batch has examples taken for the whole batch's."""
    assert seen.axes is not None
    counted = [axis for axis in seen.axes if axis is not None]
    lengths = {
        s[a]
        for shapes in seen.shapes
        for s, a in zip(shapes, seen.axes, strict=True)
        if a is not None
    }
    if len(counted) < 2 or len(lengths) > 1:
        return
    for leaf, axis in enumerate(seen.axes):
        if axis is not None and leaf != label and said[leaf] is ...:
            yield (*seen.axes[:leaf], None, *seen.axes[leaf + 1 :])


def _is_only_clue(counts: Sequence[int | None]) -> bool:
    """Whether no batch has a count that is sure."""
    return all(count is None for count in counts)


def _said(given: Any, batch: Any) -> list[Any]:
    """What the user says of each leaf; ``...`` where nothing."""
    if given is None:
        return [...] * len(list(leaves(batch)))
    return list(_said_of(given, batch, "batch_axes"))


def _said_of(given: Any, item: Any, where: str) -> Iterator[Any]:
    if given is ... or given is None or (isinstance(given, int) and not isinstance(given, bool)):
        for leaf in leaves(item):
            if isinstance(given, int) and not -1 < given < max(1, len(shape_of(leaf))):
                raise InvalidArgumentError(
                    f"`{where}` names dimension {given} of a tensor of shape "
                    f"{list(shape_of(leaf))}; name one of its dimensions, or None for a tensor "
                    "that belongs to the whole batch"
                )
            yield given
        return
    if isinstance(given, Mapping) and isinstance(item, Mapping) and set(given) <= set(item):
        for key, value in item.items():
            yield from _said_of(given.get(key, ...), value, f"{where}[{key!r}]")
        return
    fits = isinstance(given, tuple | list) and isinstance(item, tuple | list)
    if not fits or len(given) != len(item):
        raise InvalidArgumentError(
            f"`{where}` is {given!r}, and a batch has another structure: {describe(item)}"
        )
    for place, value in enumerate(item):
        yield from _said_of(given[place], value, f"{where}[{place}]")


def _listed(shapes: Iterable[tuple[int, ...]]) -> str:
    return ", ".join(str(list(shape)) for shape in shapes)


def describe(item: Any) -> str:
    """A batch in words: what it holds, with shapes."""
    if isinstance(item, Tensor):
        return f"a tensor of shape {list(item.shape)}"
    if isinstance(item, Mapping):
        return "a dict of " + ", ".join(f"{k}: {describe(v)}" for k, v in item.items())
    if isinstance(item, tuple | list):
        return f"a {type(item).__name__} of " + ", ".join(map(describe, item))
    return f"a {type(item).__name__}"


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
