"""Results with an entry for every feature of every training example: all of them, or the largest.

Shapes: m test examples, n training examples, k requested features, d dimensions of an example's
input.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from influence_kit.core.arguments import shown
from influence_kit.data.batches import Batch, example_count
from influence_kit.errors import InvalidArgumentError
from influence_kit.scoring.reducers import TopK

# indices in the training set, and their part of the result
Block = tuple[Tensor, Tensor]
# the index at which a batch begins, the requested rows of it, and the batch
Rows = tuple[int, Tensor, Batch]


class MostInfluentialFeatures(NamedTuple):
    """The k features of training examples that have the largest effect on each of m test examples.

    Attributes:
        indices: int64 ``[m, k, 1 + d]``: the example's index in the training set, then the index of
            the feature in its input (or in the output of the layer).
        influence_scores: ``[m, k]``, the largest absolute value first, each with its own sign.
    """

    indices: Tensor
    influence_scores: Tensor


def check_train_indices(train_indices: Any, count: int) -> Tensor | None:
    """Indices in a training set of ``count`` examples (0 if unknown), ``[n]``; None for all."""
    if train_indices is None:
        return None
    try:
        indices = torch.as_tensor(train_indices).cpu()
    except (TypeError, ValueError, RuntimeError):
        indices = torch.zeros(0)
    if indices.dtype not in (torch.int64, torch.int32) or indices.dim() != 1 or not len(indices):
        raise InvalidArgumentError(
            "`train_indices` must be a list of one or more indices in the training set (ints); got "
            f"{shown(train_indices)}"
        )
    if indices.min() < 0 or (count and indices.max() >= count):
        _refuse_indices(indices, count)
    return indices.long()


def _refuse_indices(indices: Tensor, count: int) -> None:
    size = f", which has {count} examples" if count else ""
    raise InvalidArgumentError(
        f"`train_indices` holds indices from {indices.min()} to {indices.max()}; they must be at "
        f"least 0 and within the training set{size}"
    )


def chosen_rows(
    batches: Iterable[Batch], indices: Tensor | None, tick: Callable[[], object]
) -> Iterator[Rows]:
    """The batches that hold the indices, read no further than needed; all batches if None."""
    start = 0
    for batch in batches:
        n = example_count(batch)
        rows = torch.arange(n)
        if indices is not None:
            rows = rows[torch.isin(rows + start, indices)]
        if len(rows):
            yield start, rows, batch
        start += n
        tick()
        if indices is not None and start > indices.max():
            return
    if indices is not None:
        _refuse_indices(indices, start)


def joined(blocks: Iterable[Block], wanted: Tensor | None) -> Tensor:
    """The whole result ``[m, n, *shape]``, in the order of the requested indices."""
    parts: list[Tensor] = []
    for indices, block in blocks:
        if parts and block.shape[2:] != parts[0].shape[2:]:
            raise InvalidArgumentError(
                f"the perturbed tensor has shape {list(block.shape[2:])} for training example "
                f"{indices[0]} and {list(parts[0].shape[2:])} for earlier ones: one tensor cannot "
                "hold both. Pass `k`, or `train_indices` of examples of one shape"
            )
        parts.append(block)
    whole = torch.cat(parts, dim=1)
    if wanted is None:
        return whole
    return whole[:, torch.unique(wanted, return_inverse=True)[1]]


def most_influential(blocks: Iterable[Block], k: int) -> MostInfluentialFeatures:
    """The k entries with the largest absolute values, in memory for ``m * k`` and one block."""
    best: list[MostInfluentialFeatures] = []
    for examples, block in blocks:
        scores = block.flatten(1)
        columns = _largest(scores, k)
        indices = torch.stack(torch.unravel_index(columns, block.shape[1:]), dim=-1)
        indices[..., 0] = examples.to(block.device)[indices[..., 0]]
        best.append(MostInfluentialFeatures(indices, scores.gather(1, columns)))
        indices, scores = (torch.cat(both, dim=1) for both in zip(*best, strict=True))
        order = _largest(scores, k)
        indices = indices.take_along_dim(order[..., None], dim=1)
        best = [MostInfluentialFeatures(indices, scores.gather(1, order))]
    return best[0]


def _largest(scores: Tensor, k: int) -> Tensor:
    """The columns of the k largest absolute values of each row; the first of equal ones."""
    top = TopK(k, proponents=True)
    top.update(torch.arange(scores.shape[1]), scores.abs())
    return top.local_result().indices
