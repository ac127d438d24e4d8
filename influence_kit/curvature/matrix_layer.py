"""The gradient of a linear layer or convolution, with its bias, as one matrix per example.

Shapes: n examples, t positions, g groups, o outputs and i inputs (with the bias) of a group.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from influence_kit.gradients.convolved import Convolved
from influence_kit.gradients.factored import Factored
from influence_kit.gradients.form import Form

Forms = Mapping[str, Form]


def with_ones(inputs: Tensor) -> Tensor:
    """The inputs with a last entry 1 for the bias."""
    return torch.cat([inputs, torch.ones_like(inputs[..., :1])], dim=-1)


@dataclass(frozen=True)
class MatrixLayer:
    """A linear layer or convolution.

    Args:
        weight: name of its weight.
        bias: name of its bias; None if no bias counts.
        groups: the number g of groups.
        transposed: whether the weight is stored as (inputs, outputs).
        outputs: the number o of outputs of a group.
        inputs: the number i of inputs of a group, with the bias.
    """

    weight: str
    bias: str | None
    groups: int
    transposed: bool
    outputs: int
    inputs: int

    @staticmethod
    def of(names: Sequence[str], state: Mapping[str, Tensor]) -> MatrixLayer:
        """The layer of these parameters, weight first, given the tensors of its fitted state."""
        return MatrixLayer(
            names[0],
            names[1] if len(names) > 1 else None,
            int(state["groups"]),
            bool(state["transposed"]),
            state["left_values"].shape[-1],
            state["right_values"].shape[-1],
        )

    def factors(self, forms: Forms) -> tuple[Tensor, Tensor] | None:
        """D ``[n, t, o]`` and a ``[n, t, i]``; None if the gradient has no such factors."""
        form = forms.get(self.weight)
        if isinstance(form, Convolved) and self.groups == 1:
            form = form.factored()
        if not isinstance(form, Factored):
            return None
        return form.deltas, form.inputs if self.bias is None else with_ones(form.inputs)

    def single(self, forms: Forms) -> tuple[Tensor, Tensor] | None:
        """The pair d ``[n, o]`` and a ``[n, i]`` of examples of one position; None for others."""
        form = forms.get(self.weight)
        if not isinstance(form, Factored) or form.deltas.shape[1] != 1:
            return None
        inputs = form.inputs if self.bias is None else with_ones(form.inputs)
        return form.deltas[:, 0], inputs[:, 0]

    def matrices(self, forms: Forms) -> Tensor:
        """G as matrices, ``[n, g, o, i]``."""
        weights = self._weights(forms[self.weight])
        if self.bias is None:
            return weights
        biases = forms[self.bias].dense().view(-1, self.groups, self.outputs, 1)
        return torch.cat([weights, biases], dim=3)

    def _weights(self, form: Form) -> Tensor:
        """G without the bias; a view if the form is dense."""
        if self.transposed:
            return form.dense().view(-1, 1, self.width, self.outputs).transpose(2, 3)
        return form.dense().view(-1, self.groups, self.outputs, self.width)

    @property
    def width(self) -> int:
        """The number of inputs of a group without the bias."""
        return self.inputs - (self.bias is not None)

    def times(self, forms: Forms, right: Tensor | None) -> Tensor:
        """G times one matrix per group ``[g, i, *]``, or G if None: ``[n, g, o, *]``."""
        if right is None:
            return self.matrices(forms)
        form, inputs = forms[self.weight], self.width
        if isinstance(form, Convolved) and self.groups == 1:
            product = form.times(right[0, :inputs]).unsqueeze(1)
        else:
            product = self._weights(form) @ right[:, :inputs]
        if self.bias is not None:
            biases = forms[self.bias].dense().view(-1, self.groups, self.outputs, 1)
            product.addcmul_(biases, right[:, inputs:])
        return product

    def split(self, matrices: Tensor) -> dict[str, Tensor]:
        """Matrices ``[n, g, o, i]`` by parameter, ``[n, p]``."""
        weights = matrices if self.bias is None else matrices[..., :-1]
        if self.transposed:
            weights = weights.transpose(2, 3)
        found = {self.weight: weights.flatten(1)}
        if self.bias is not None:
            found[self.bias] = matrices[..., -1].flatten(1)
        return found


def turned(values: Tensor, vectors: Tensor | None) -> Tensor:
    """Rows ``[..., s]`` in a basis ``[..., s, s]``; None means the unit vectors."""
    return values if vectors is None else values @ vectors


def rotated(
    layer: MatrixLayer, left: Tensor | None, right: Tensor | None, forms: Forms
) -> Iterable[Tensor]:
    """Q_S^T G Q_A, ``[n, g, o, i]`` in chunks of examples: factors or matrices, the cheaper.

    None as a basis means the unit vectors. Chunks may be views of the tensors of the forms.
    """
    o, i, form = layer.outputs, layer.inputs, forms[layer.weight]
    rows_cost, columns_cost = (o * (left is not None), i * (right is not None))
    for rows in form.example_slices(2 * layer.groups * o * i):
        some = {name: forms[name].rows(rows) for name in (layer.weight, layer.bias) if name}
        t = _positions(form)
        of_factors = t * (o * rows_cost + i * columns_cost)
        if t and layer.groups == 1 and of_factors < o * i * (rows_cost + columns_cost):
            factors = layer.factors(some)
            assert factors is not None
            deltas = turned(factors[0], None if left is None else left[0])
            inputs = turned(factors[1], None if right is None else right[0])
            yield torch.bmm(deltas.transpose(1, 2), inputs).unsqueeze(1)
        else:
            product = layer.times(some, right)
            yield product if left is None else left.transpose(1, 2) @ product


def _positions(form: Form) -> int:
    """The number t of positions; 0 if the form has none."""
    if isinstance(form, Convolved):
        return form.positions
    return form.deltas.shape[1] if isinstance(form, Factored) else 0
