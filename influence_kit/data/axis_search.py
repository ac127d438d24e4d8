"""Finds the dimension that counts examples in each tensor of a batch, from several shapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, product
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from influence_kit.core.arguments import shown
from influence_kit.data.marked_batch import Axes, describe, holds_tensor, leaves, shape_of
from influence_kit.errors import InvalidArgumentError

# the keys of labels in a dict batch, tried in this order
LABEL_KEYS = ("labels", "label", "targets", "target", "y")
MOST_CHOICES = 16


def grows(two: Sequence[tuple[int, ...]], three: Sequence[tuple[int, ...]]) -> bool:
    """Whether a leaf has length 2 in a batch of two examples, and 3 in a batch of three."""
    pairs = zip(two, three, strict=True)
    return any((2, 3) in zip(a, b, strict=False) for a, b in pairs)


def structure_of(item: Any) -> Any:
    """What batches of one kind share: nesting, keys, and the number of dimensions of tensors."""
    if isinstance(item, Mapping):
        return ("dict", *((key, structure_of(value)) for key, value in item.items()))
    if isinstance(item, tuple | list) and not isinstance(item, PackedSequence):
        return tuple(structure_of(value) for value in item) if holds_tensor(item) else "list"
    return item.dim() if isinstance(item, Tensor) else type(item).__name__


def label_leaf(batch: Any) -> int | None:
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
        for index, leaf in enumerate(own):
            if isinstance(leaf, Tensor) and shape_of(leaf):
                return first + index
    return None


def likely_axes(
    shapes: Sequence[tuple[tuple[int, ...], ...]], counts: Sequence[int | None], label: int | None
) -> list[Axes]:
    """The axis of each leaf whose length is the number of examples in all batches.

    Where several axes of a leaf have these lengths, the likeliest choice comes first.
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
        # targets almost always have their examples in the first dimension
        votes += (100 if _is_only_clue(counts) else 1.5) * (label in in_front)
        return votes, max(len(shapes[0][leaf]) for leaf in having)

    best = max(fitting, key=likelihood)
    choices: list[list[int | None]] = [
        [a for a in range(len(shape)) if lengths[leaf, a] == best] or [None]
        for leaf, shape in enumerate(shapes[0])
    ]
    if best == (1,) * len(shapes):  # a batch of one example is not cut
        choices = [choice[:1] for choice in choices]
    return list(islice(product(*choices), MOST_CHOICES))


def with_one_less(
    shapes_seen: Sequence[tuple[tuple[int, ...], ...]],
    axes: Axes,
    label: int | None,
    given: Sequence[Any],
) -> Iterator[Axes]:
    """The axes with one leaf given to the whole batch: it may have its length only by chance."""
    counted = [axis for axis in axes if axis is not None]
    lengths = {
        s[a] for shapes in shapes_seen for s, a in zip(shapes, axes, strict=True) if a is not None
    }
    if len(counted) < 2 or len(lengths) > 1:
        return
    for leaf, axis in enumerate(axes):
        if axis is not None and leaf != label and given[leaf] is ...:
            yield (*axes[:leaf], None, *axes[leaf + 1 :])


def _is_only_clue(counts: Sequence[int | None]) -> bool:
    """Whether targets are the only clue: the number of examples is known for no batch."""
    return all(count is None for count in counts)


def given_axes(given: Any, batch: Any) -> list[Any]:
    """The axis that the user gives for each leaf; ``...`` where none is given."""
    if given is None:
        return [...] * len(list(leaves(batch)))
    return list(_axes_of(given, batch, "batch_axes"))


def _axes_of(given: Any, item: Any, where: str) -> Iterator[Any]:
    if given is ... or given is None or (isinstance(given, int) and not isinstance(given, bool)):
        for leaf in leaves(item):
            if isinstance(given, int) and not -1 < given < max(1, len(shape_of(leaf))):
                raise InvalidArgumentError(
                    f"`{where}` is dimension {given} of a tensor of shape "
                    f"{list(shape_of(leaf))}; give one of its dimensions, or None for a tensor "
                    "that belongs to the whole batch"
                )
            yield given
        return
    if isinstance(given, Mapping) and isinstance(item, Mapping) and set(given) <= set(item):
        for key, value in item.items():
            yield from _axes_of(given.get(key, ...), value, f"{where}[{key!r}]")
        return
    fits = isinstance(given, tuple | list) and isinstance(item, tuple | list)
    if not fits or len(given) != len(item):
        raise InvalidArgumentError(
            f"`{where}` is {shown(given)}, but a batch has another structure: {describe(item)}"
        )
    for index, value in enumerate(item):
        yield from _axes_of(given[index], value, f"{where}[{index}]")


def in_lists(batch: Any) -> int | None:
    """1 for a batch whose targets are a list of one dict (boxes and their labels, say).

    Raises:
        InvalidArgumentError: if they are a list of several dicts: no dimension counts examples.
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
