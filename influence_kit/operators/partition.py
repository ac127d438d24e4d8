"""Parameters in blocks, and vectors ``[k, P]`` that hold the blocks one after the other.

Shapes: k vectors, P elements of all blocks, B blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from influence_kit.gradients.forms import Dense
from influence_kit.gradients.per_example import Gradients


def dots(left: Tensor, right: Tensor, sizes: Sequence[int]) -> Tensor:
    """Inner products of the rows per block, in float64: ``[k, B]``."""
    pieces = zip(left.split(list(sizes), 1), right.split(list(sizes), 1), strict=True)
    return torch.stack([torch.einsum("kp,kp->k", x.double(), y.double()) for x, y in pieces], dim=1)


def spread(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """One value per block, ``[..., B]``, repeated for the block's elements: ``[..., P]``."""
    return values.repeat_interleave(torch.tensor(sizes, device=values.device), dim=-1)


@dataclass(frozen=True)
class Partition:
    """Which parameters form each block.

    Args:
        blocks: the names of parameters by block; each name occurs once.
        shapes: the shapes of these parameters.
    """

    blocks: Mapping[str, Sequence[str]]
    shapes: Mapping[str, torch.Size]

    @cached_property
    def names(self) -> list[str]:
        """All parameters, in the order of vectors."""
        return [name for names in self.blocks.values() for name in names]

    @cached_property
    def sizes(self) -> list[int]:
        """The number of elements of each block."""
        return [
            sum(math.prod(self.shapes[name]) for name in names) for names in self.blocks.values()
        ]

    def flat(self, gradients: Gradients) -> Tensor:
        """Gradients written out, ``[n, P]``, without parameters that are in no block."""
        shapes = {name: self.shapes[name] for name in self.names}
        return Gradients(gradients.n, gradients.forms, shapes, gradients.sample).flat()

    def columns(self, vectors: Tensor) -> dict[str, Tensor]:
        """The columns of each parameter, ``[k, p]``."""
        parts = vectors.split([math.prod(self.shapes[name]) for name in self.names], dim=1)
        return dict(zip(self.names, parts, strict=True))

    def split(self, vectors: Tensor) -> dict[str, Tensor]:
        """The vectors by parameter, ``[k, *shape]``."""
        columns = self.columns(vectors).items()
        return {name: part.reshape(-1, *self.shapes[name]) for name, part in columns}

    def gradients(self, vectors: Tensor, like: Gradients) -> Gradients:
        """Vectors as gradients of the parameters of ``like``."""
        columns = self.columns(vectors).items()
        forms = {name: Dense(part, self.shapes[name]) for name, part in columns}
        return Gradients(len(vectors), forms, like.parameters, like.sample)
