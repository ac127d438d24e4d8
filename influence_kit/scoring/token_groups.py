"""The data of a call for token scores: training examples with indices, test examples in groups."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from influence_kit.core.memory import resident_bytes, rows_within
from influence_kit.data.batches import Batch, example_count, example_lengths, split

# a batch, with the indices of its examples
Numbered = tuple[Tensor, Batch]


class Piece(NamedTuple):
    """Some tokens of test examples: a batch, the index of its first example, and which tokens."""

    start: int
    batch: Batch
    part: slice | None = None


def numbered(batches: Iterable[Batch]) -> Iterator[Numbered]:
    """All batches of a data set, in order."""
    start = 0
    for batch in batches:
        n = example_count(batch)
        yield torch.arange(start, start + n), batch
        start += n


def one_group(batches: Iterable[Batch]) -> list[list[Piece]]:
    """All test examples in one group."""
    pieces = []
    start = 0
    for batch in batches:
        pieces.append(Piece(start, batch))
        start += example_count(batch)
    return [pieces]


def groups_within(
    batches: Iterable[Batch], row_bytes: int, by_term: bool, device: torch.device
) -> Iterator[list[Piece]]:
    """The test examples in groups whose tokens fit the memory, at ``row_bytes`` bytes per token.

    The number of tokens is estimated by the longest dimension of an example's tensors.
    """
    budget = rows_within(resident_bytes(device), row_bytes)
    group: list[Piece] = []
    held = start = 0
    for batch in batches:
        longest = max([length for lengths in example_lengths(batch) for length in lengths] or [1])
        for piece in split(batch, max(1, budget // longest)):
            n = example_count(piece)
            step = max(1, budget // n) if by_term else budget
            for first in range(0, longest, step):
                is_last = first + step >= longest
                part = slice(first, None if is_last else first + step)
                rows = n * min(step, longest - first)
                if group and held + rows > budget:
                    yield group
                    group, held = [], 0
                group.append(Piece(start, piece, part))
                held += rows
            start += n
    if group:
        yield group
