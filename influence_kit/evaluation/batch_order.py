"""Which examples each step of models that are trained together takes.

Shapes: n training examples, B models, p of them in a part, b examples per batch.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from influence_kit.errors import InvalidArgumentError


class Part(NamedTuple):
    """Models whose batches of a step are of one size.

    Attributes:
        models: their indices ``[p]``; None for all.
        rows: the examples of each, ``[p, b]``.
        share: the factor of the loss of each batch.
    """

    models: Tensor | None
    rows: Tensor
    share: float = 1.0


StepParts = list[Part]  # each model is in exactly one part


def own_batches(
    subsets: Sequence[Tensor], generators: Sequence[torch.Generator], size: int
) -> Iterator[StepParts]:
    """The steps of an epoch: each subset, all of one size, in its own order."""
    orders = [
        subset[torch.randperm(len(subset), generator=generator)]
        for subset, generator in zip(subsets, generators, strict=True)
    ]
    for rows in torch.stack(orders).split(size, dim=1):
        yield [Part(None, rows)]


def shared_batches(
    n: int, subsets: Sequence[Tensor], generators: Sequence[torch.Generator], size: int
) -> Iterator[StepParts]:
    """The steps of an epoch: the batches of all n examples, without those that a subset lacks.

    The loss of the remaining examples is multiplied by their share of the batch, so that each
    example has the same weight as in the full batch.

    Raises:
        InvalidArgumentError: for a subset that contains an example twice.
    """
    has = torch.zeros(len(subsets), n, dtype=torch.bool)
    for mine, subset in zip(has, subsets, strict=True):
        mine[subset] = True
        if int(mine.sum()) != len(subset):
            raise InvalidArgumentError(
                f"a subset of {len(subset)} indices has {int(mine.sum())} different ones; with "
                "`same_batches` no index may repeat"
            )
    orders = torch.stack([torch.randperm(n, generator=generator) for generator in generators])
    for rows in orders.split(size, dim=1):
        yield _by_size(rows, has.gather(1, rows))


def _by_size(rows: Tensor, kept: Tensor) -> StepParts:
    """The kept entries of the rows ``[B, b]``, grouped into parts by how many each model keeps."""
    sizes = kept.sum(dim=1)
    step = []
    for size in sizes.unique().tolist():
        models = torch.nonzero(sizes == size).flatten()
        mine = rows[models]
        if size > 0:  # a share of 0: any examples will do
            mine = mine[kept[models]].view(-1, size)
        everyone = len(models) == len(rows)
        step.append(Part(None if everyone else models, mine, size / rows.shape[1]))
    return step
