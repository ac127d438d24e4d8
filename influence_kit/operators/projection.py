"""Gradients made short, layer by layer: a matrix from both sides, before it is formed.

Letters: n examples, t positions, o outputs and i inputs (with the bias) of a layer, p entries of
its gradient, k entries of what they are projected to.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from influence_kit.gradients.convolved import Convolved
from influence_kit.gradients.factored import Factored
from influence_kit.gradients.forms import Dense, Form, Sum
from influence_kit.gradients.per_example import Gradients
from influence_kit.gradients.rows import Rows
from influence_kit.gradients.rules import convolution, linear, rule_for, transposed_linear
from influence_kit.operators.random_maps import Identity, RandomMap, random_map

Forms = Mapping[str, Form]


@dataclass(frozen=True)
class Unit:
    """Parameters that are projected together: a layer's matrix with its bias, or one parameter.

    Args:
        names: the weight, then the bias if there is one.
        outputs: the letter o; 0 for what is no matrix.
        inputs: the letter i.
        transposed: whether the weight is stored as (inputs, outputs).
    """

    names: tuple[str, ...]
    outputs: int
    inputs: int
    transposed: bool = False

    @property
    def bias(self) -> str | None:
        """The name of the bias."""
        return self.names[1] if len(self.names) > 1 else None


def units_of(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> list[Unit]:
    """The units of the chosen parameters, in their order."""
    units = [_unit_of(name, model, parameters) for name in parameters]
    # a bias may come before its weight
    joined = {unit.bias for unit in units}
    return [unit for unit in units if unit.names[0] not in joined]


def _unit_of(name: str, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Unit:
    """A parameter with what is projected together with it."""
    owner, _, attribute = name.rpartition(".")
    rule, shape = rule_for(model.get_submodule(owner)), parameters[name].shape
    bias = f"{owner}.bias".removeprefix(".")
    has_matrix = rule in (linear, convolution, transposed_linear) and attribute == "weight"
    names = (name, bias) if has_matrix and bias in parameters else (name,)
    rows, columns = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (0, 0)
    transposed = has_matrix and rule is transposed_linear
    outputs, inputs = (columns, rows) if transposed else (rows, columns)
    return Unit(names, outputs, inputs + len(names) - 1, transposed)


class UnitMap(ABC):
    """What a unit's gradient becomes."""

    k: int

    @abstractmethod
    def __call__(self, gradients: Gradients) -> Tensor | None:
        """The images ``[n, k]``; None where the unit has no gradient."""


@dataclass
class TwoSided(UnitMap):
    """vec(P_o^T G P_i) of a matrix G = sum_t d_t [a_t, 1]^T, projected before it is formed.

    Args:
        unit: the matrix.
        left: P_o, of o entries.
        right: P_i, of i entries.
        then: a map of the result; None for none.
    """

    unit: Unit
    left: RandomMap
    right: RandomMap
    then: RandomMap | None = None
    _column: Tensor | None = field(default=None, repr=False)

    @property
    def k(self) -> int:  # type: ignore[override]
        """Entries of the image."""
        return self.left.k * self.right.k if self.then is None else self.then.k

    def __call__(self, gradients: Gradients) -> Tensor | None:
        form = gradients.forms.get(self.unit.names[0])
        product = None if form is None else self._product(form)
        if self.unit.bias is not None and self.unit.bias in gradients.forms:
            deltas = self.left(gradients.forms[self.unit.bias].dense())
            last = torch.tensor([self.unit.inputs - 1], device=deltas.device)
            outer = deltas.unsqueeze(-1) * self.right.rows(last, deltas)
            product = outer if product is None else product.add_(outer)
        if product is None:
            return None
        flat = product.flatten(1)
        return flat if self.then is None else self.then(flat)

    def _right(self, inputs: Tensor) -> Tensor:
        """P_i^T times inputs ``[..., i]`` without the bias's 1."""
        return self.right(inputs if self.unit.bias is None else pad(inputs, (0, 1)))

    def _product(self, form: Form) -> Tensor:
        """The weight's part, ``[n, k_o, k_i]``."""
        if isinstance(form, Sum):
            parts = [self._product(part) for part in form.parts]
            return torch.stack(parts).sum(0)
        # a parameter of two layers may be stored the other way round for one of them
        if isinstance(form, Factored) and form.transposed == self.unit.transposed:
            deltas = self.left(form.deltas)
            return torch.bmm(deltas.transpose(1, 2), self._right(form.inputs))
        if isinstance(form, Rows):
            return self._looked_up(form)
        if isinstance(form, Convolved) and form.groups == 1:
            weights = self.unit.inputs - (self.unit.bias is not None)
            right = form.times(self.right.matrix(form.sample)[:weights].contiguous())
            return self.left(right.transpose(1, 2)).transpose(1, 2).contiguous()
        parts = [self._written(form.rows(rows)) for rows in form.example_slices(2 * form.p)]
        return torch.cat(parts)

    def _looked_up(self, form: Rows) -> Tensor:
        """Of an embedding: outer products of the rows of P_o and the projected values."""
        product = form.values.new_zeros(form.n, self.left.k, self.right.k)
        left, right = self.left.rows(form.ids, form.values), self._right(form.values)
        step = max(1, form.n)
        for start in range(0, len(form.ids), step):
            some = slice(start, start + step)
            outer = left[some].unsqueeze(2) * right[some].unsqueeze(1)
            product.index_add_(0, form.places[some], outer)
        return product

    def _written(self, form: Form) -> Tensor:
        """Of a gradient that comes without factors."""
        weights = self.unit.inputs - (self.unit.bias is not None)
        if self.unit.transposed:
            columns = form.dense().view(form.n, weights, self.unit.outputs)
        else:
            columns = form.dense().view(form.n, self.unit.outputs, weights).transpose(1, 2)
        left = self.left(columns)  # [n, i, k_o]
        return self._right(left.transpose(1, 2))


@dataclass
class WrittenOut(UnitMap):
    """A map of the gradients of some parameters, written out side by side."""

    shapes: Mapping[str, torch.Size]
    map: RandomMap

    @property
    def k(self) -> int:  # type: ignore[override]
        """Entries of the image."""
        return self.map.k

    def __call__(self, gradients: Gradients) -> Tensor | None:
        forms = {name: form for name, form in gradients.forms.items() if name in self.shapes}
        if not forms:
            return None
        own = Gradients(gradients.n, forms, self.shapes, gradients.sample)
        slices = next(iter(forms.values())).example_slices(2 * self.map.p)
        return torch.cat([self.map(own.rows(rows).flat()) for rows in slices])


@dataclass(frozen=True)
class Projection:
    """Each unit's gradient projected on its own, under the name of its first parameter."""

    maps: Mapping[str, UnitMap]

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """What the gradients are projected to, by name."""
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
    """A matrix as it is, with its bias in one piece."""
    return TwoSided(unit, Identity(unit.outputs), Identity(unit.inputs))


def from_both_sides(
    unit: Unit, shape: torch.Size, kind: str, dim: int | Sequence[int], seed: int
) -> UnitMap:
    """A matrix projected from both sides, a vector from its one.

    Args:
        unit: what is projected.
        shape: of its first parameter.
        kind: of the random maps.
        dim: as ``columns_within`` takes it; a vector is projected to the products of a pair.
        seed: of the maps; with the unit's name.
    """
    name = unit.names[0]
    if not unit.outputs:
        p, k = shape.numel(), dim if isinstance(dim, int) else math.prod(dim)
        kept = kind == "identity" or p <= k
        return WrittenOut(
            {name: shape}, Identity(p) if kept else random_map(kind, p, k, seed, name)
        )
    columns = columns_within(dim, unit.outputs, unit.inputs)
    if kind == "identity" or columns is None:
        return whole(unit)
    left, right = columns
    return TwoSided(
        unit,
        random_map(kind, unit.outputs, left, seed, name, "outputs"),
        random_map(kind, unit.inputs, right, seed, name, "inputs"),
    )


def layer_by_layer(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    dim: int | Sequence[int],
    seed: int,
    kind: str = "gaussian",
) -> Projection:
    """The chosen parameters projected unit by unit, each from both sides."""
    return Projection(
        {
            unit.names[0]: from_both_sides(unit, parameters[unit.names[0]].shape, kind, dim, seed)
            for unit in units_of(model, parameters)
        }
    )


def columns_within(dim: int | Sequence[int], outputs: int, inputs: int) -> tuple[int, int] | None:
    """How many columns P_o and P_i get; None where the matrix is to stay as it is.

    Args:
        dim: the pair, or the most products of the two: then its root for each side, and what a
            shorter side leaves for the other.
        outputs: the letter o.
        inputs: the letter i.
    """
    if not isinstance(dim, int):
        left, right = dim
        return min(left, outputs), min(right, inputs)
    if outputs * inputs <= dim:
        return None
    root = math.isqrt(dim)
    if outputs <= root:
        return outputs, min(dim // outputs, inputs)
    return (min(dim // inputs, outputs), inputs) if inputs <= root else (root, root)
