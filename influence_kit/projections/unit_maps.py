"""Maps of the gradient of a parameter group: of a matrix from both sides, or of a vector.

Shapes: n examples, t positions, o outputs and i inputs (with the bias) of a layer, p entries of
its gradient, k entries of the projection.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from influence_kit.gradients.convolved import Convolved
from influence_kit.gradients.factored import Factored
from influence_kit.gradients.form import Form
from influence_kit.gradients.forms import Sum
from influence_kit.gradients.per_example import Gradients
from influence_kit.gradients.rows import Rows
from influence_kit.projections.maps import VectorMap
from influence_kit.projections.units import Unit


class UnitMap(ABC):
    """A map of the gradient of a parameter group."""

    @property
    @abstractmethod
    def k(self) -> int:
        """The number of entries of the image."""

    @property
    @abstractmethod
    def names(self) -> Sequence[str]:
        """The parameters of the group."""

    @abstractmethod
    def __call__(self, gradients: Gradients) -> Tensor | None:
        """The images ``[n, k]``; None if the parameter group has no gradient."""


@dataclass
class TwoSided(UnitMap):
    """vec(P_o^T G P_i) of a matrix G = sum_t d_t [a_t, 1]^T, without forming G.

    Args:
        unit: the parameter group of the matrix.
        left: P_o, a map of o entries.
        right: P_i, a map of i entries.
        then: a map of the result, or None.
    """

    unit: Unit
    left: VectorMap
    right: VectorMap
    then: VectorMap | None = None

    @property
    def k(self) -> int:
        """The number of entries of the image."""
        return self.left.k * self.right.k if self.then is None else self.then.k

    @property
    def names(self) -> Sequence[str]:
        return self.unit.names

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
        """The part of the weight, ``[n, k_o, k_i]``."""
        if isinstance(form, Sum):
            parts = [self._product(part) for part in form.parts]
            return torch.stack(parts).sum(0)
        # a parameter of two layers may be stored transposed for one of them
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
        """For an embedding: outer products of the rows of P_o and the projected values."""
        product = form.values.new_zeros(form.n, self.left.k, self.right.k)
        left, right = self.left.rows(form.ids, form.values), self._right(form.values)
        step = max(1, form.n)
        for start in range(0, len(form.ids), step):
            some = slice(start, start + step)
            outer = left[some].unsqueeze(2) * right[some].unsqueeze(1)
            product.index_add_(0, form.examples[some], outer)
        return product

    def _written(self, form: Form) -> Tensor:
        """For a gradient without factors."""
        weights = self.unit.inputs - (self.unit.bias is not None)
        if self.unit.transposed:
            columns = form.dense().view(form.n, weights, self.unit.outputs)
        else:
            columns = form.dense().view(form.n, self.unit.outputs, weights).transpose(1, 2)
        left = self.left(columns)  # [n, i, k_o]
        return self._right(left.transpose(1, 2))


@dataclass
class WrittenOut(UnitMap):
    """A map of the gradients of some parameters, written out and concatenated."""

    shapes: Mapping[str, torch.Size]
    map: VectorMap

    @property
    def k(self) -> int:
        """The number of entries of the image."""
        return self.map.k

    @property
    def names(self) -> Sequence[str]:
        return list(self.shapes)

    def __call__(self, gradients: Gradients) -> Tensor | None:
        forms = {name: form for name, form in gradients.forms.items() if name in self.shapes}
        if not forms:
            return None
        own = Gradients(gradients.n, forms, self.shapes, gradients.sample)
        slices = next(iter(forms.values())).example_slices(2 * self.map.p)
        return torch.cat([self.map(own.rows(rows).flat()) for rows in slices])
