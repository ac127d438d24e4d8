"""Projects gradients separately for each parameter group, each to a given number of entries.

Shapes: n examples, o outputs and i inputs (with the bias) of a layer, p entries of its gradient, k
entries of the projection.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from influence_kit.gradients.forms import Dense
from influence_kit.gradients.per_example import Gradients
from influence_kit.projections.maps import Identity
from influence_kit.projections.random_maps import shortened
from influence_kit.projections.unit_maps import TwoSided, UnitMap, WrittenOut
from influence_kit.projections.units import Unit


@dataclass(frozen=True)
class Projection:
    """The gradient of each parameter group projected by itself, named by its first parameter."""

    maps: Mapping[str, UnitMap]

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The shapes of the projected gradients, by name."""
        return {name: torch.Size([unit.k]) for name, unit in self.maps.items()}

    def __call__(self, gradients: Gradients) -> Gradients:
        """The projected gradients, written out."""
        forms = {}
        for name, unit in self.maps.items():
            values = unit(gradients)
            if values is not None:
                forms[name] = Dense(values, torch.Size([unit.k]))
        return Gradients(gradients.n, forms, self.shapes, gradients.sample)


def whole(unit: Unit) -> TwoSided:
    """A matrix with its bias as one vector, not projected."""
    return TwoSided(unit, Identity(unit.outputs), Identity(unit.inputs))


def from_both_sides(
    unit: Unit, shape: torch.Size, kind: str, dim: int | Sequence[int], seed: int
) -> UnitMap:
    """A map that projects a matrix from both sides, or a vector; short sides are not projected.

    Args:
        unit: the parameter group.
        shape: the shape of its first parameter.
        kind: the kind of random maps.
        dim: as for ``columns_within``; a vector is projected to the product of a pair.
        seed: the seed of the maps, which also depend on the group's name.
    """
    name = unit.names[0]
    if not unit.is_matrix:
        k = dim if isinstance(dim, int) else math.prod(dim)
        return WrittenOut({name: shape}, shortened(kind, shape.numel(), k, seed, name))
    left, right = columns_within(dim, unit.outputs, unit.inputs)
    return TwoSided(
        unit,
        shortened(kind, unit.outputs, left, seed, name, "outputs"),
        shortened(kind, unit.inputs, right, seed, name, "inputs"),
    )


def columns_within(dim: int | Sequence[int], outputs: int, inputs: int) -> tuple[int, int]:
    """The numbers of columns of P_o and P_i: at most o and i.

    Args:
        dim: the pair, or the most that their product may be: then each side gets its root, or,
            if one side is shorter, the other gets what it leaves.
        outputs: the number of outputs o.
        inputs: the number of inputs i.
    """
    if not isinstance(dim, int):
        left, right = dim
        return min(left, outputs), min(right, inputs)
    root = math.isqrt(dim)
    if outputs <= root:
        return outputs, min(dim // outputs, inputs)
    return (min(dim // inputs, outputs), inputs) if inputs <= root else (root, root)
