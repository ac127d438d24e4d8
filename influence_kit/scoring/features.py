"""What is kept of results that have an entry for every feature of every training example.

Letters: m test and n training examples, k features asked for, d dimensions of an example's input.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from influence_kit.data.batches import Batch, example_count
from influence_kit.errors import InvalidArgumentError
from influence_kit.scoring.reducers import TopK

# places in the training set, and their part of the result
Block = tuple[Tensor, Tensor]
# a batch with the place where it begins and the rows of it that are wanted
Rows = tuple[int, Tensor, Batch]


class MostInfluentialFeatures(NamedTuple):
    """The k features of training examples that have the largest effect on each of m test examples.

    Attributes:
        indices: int64 ``[m, k, 1 + d]``: the example's place in the training set, then the place of
            the feature in its input (or in the output of the layer).
        influence_scores: ``[m, k]``, the largest absolute value first, each with its own sign.
    """

    indices: Tensor
    influence_scores: Tensor


def check_places(train_indices: Any, count: int) -> Tensor | None:
    """Places in a training set of ``count`` examples (0 where unknown), ``[n]``; None for all."""
    if train_indices is None:
        return None
    try:
        places = torch.as_tensor(train_indices).cpu()
    except (TypeError, ValueError, RuntimeError):
        places = torch.zeros(0)
    if places.dtype not in (torch.int64, torch.int32) or places.dim() != 1 or not len(places):
        raise InvalidArgumentError(
            "`train_indices` must be a list of places in the training set, one int or more; got "
            f"{train_indices!r}"
        )
    if places.min() < 0 or (count and places.max() >= count):
        _refuse_places(places, count)
    return places.long()


def _refuse_places(places: Tensor, count: int) -> None:
    size = f", which has {count} examples" if count else ""
    raise InvalidArgumentError(
        f"`train_indices` holds places from {places.min()} to {places.max()}; they must be 0 or "
        f"more and within the training set{size}"
    )


def chosen_rows(
    batches: Iterable[Batch], places: Tensor | None, tick: Callable[[], object]
) -> Iterator[Rows]:
    """The batches that hold the places, read no further than needed; all where None."""
    start = 0
    for batch in batches:
        n = example_count(batch)
        rows = torch.arange(n)
        if places is not None:
            rows = rows[torch.isin(rows + start, places)]
        if len(rows):
            yield start, rows, batch
        start += n
        tick()
        if places is not None and start > places.max():
            return
    if places is not None:
        _refuse_places(places, start)


def joined(blocks: Iterable[Block], wanted: Tensor | None) -> Tensor:
    """The whole result ``[m, n, *shape]``, in the order of the places that were asked for."""
    parts: list[Tensor] = []
    for places, block in blocks:
        if parts and block.shape[2:] != parts[0].shape[2:]:
            raise InvalidArgumentError(
                f"what is perturbed has shape {list(block.shape[2:])} for training example "
                f"{places[0]} and {list(parts[0].shape[2:])} for those before it: one tensor "
                "cannot hold both. Ask for `k`, or by `train_indices` for examples of one shape"
            )
        parts.append(block)
    whole = torch.cat(parts, dim=1)
    if wanted is None:
        return whole
    return whole[:, torch.unique(wanted, return_inverse=True)[1]]


def most_influential(blocks: Iterable[Block], k: int) -> MostInfluentialFeatures:
    """The k entries with the largest absolute values, in memory for ``m * k`` and a block."""
    best: list[MostInfluentialFeatures] = []
    for places, block in blocks:
        scores = block.flatten(1)
        columns = _largest(scores, k)
        indices = torch.stack(torch.unravel_index(columns, block.shape[1:]), dim=-1)
        indices[..., 0] = places.to(block.device)[indices[..., 0]]
        best.append(MostInfluentialFeatures(indices, scores.gather(1, columns)))
        indices, scores = (torch.cat(both, dim=1) for both in zip(*best, strict=True))
        order = _largest(scores, k)
        indices = indices.take_along_dim(order[..., None], dim=1)
        best = [MostInfluentialFeatures(indices, scores.gather(1, order))]
    return best[0]


def _largest(scores: Tensor, k: int) -> Tensor:
    """The columns of the k largest absolute values of each row; of equal ones the first."""
    top = TopK(k, proponents=True)
    top.update(torch.arange(scores.shape[1]), scores.abs())
    return top.local_result().indices
