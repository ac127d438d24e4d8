"""A marked batch: a tuple or dict that also holds its number of examples and their dimensions.

Shapes: n examples of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

# per leaf: the dimension that counts examples, or None if it belongs to the whole batch
Axes = tuple[int | None, ...]


def leaves(item: Any) -> Iterator[Any]:
    """The tensors of nested tuples, lists and dicts, and the lists without tensors, in order."""
    if isinstance(item, PackedSequence):  # its rows are not examples, and it cannot be cut
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
    """Whether nested tuples, lists and dicts hold a tensor."""
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
    """A batch of n examples, marked with the dimension of each leaf that counts them."""
    batch: Known = KnownDict(items) if isinstance(items, Mapping) else KnownTuple(items)
    batch.n, batch.axes = n, axes
    return batch


def describe(item: Any) -> str:
    """A batch in words: what it holds, with shapes."""
    if isinstance(item, Tensor):
        return f"a tensor of shape {list(item.shape)}"
    if isinstance(item, Mapping):
        return "a dict of " + ", ".join(f"{k}: {describe(v)}" for k, v in item.items())
    if isinstance(item, tuple | list):
        return f"a {type(item).__name__} of " + ", ".join(map(describe, item))
    return f"a {type(item).__name__}"
