"""The gradient of a linear layer or convolution, with its bias, as one matrix an example.

Letters: n examples, t positions, g groups, o outputs and i inputs (with the bias) of a group.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from influence_kit.gradients.convolved import Convolved
from influence_kit.gradients.factored import Factored
from influence_kit.gradients.forms import Form

Forms = Mapping[str, Form]


def with_ones(inputs: Tensor) -> Tensor:
    """A last entry 1 for the bias."""
    return torch.cat([inputs, torch.ones_like(inputs[..., :1])], dim=-1)


@dataclass(frozen=True)
class MatrixLayer:
    """A linear layer or convolution.

    Args:
        weight: name of its weight.
        bias: name of its bias, None where it has none that counts.
        groups: the letter g.
        transposed: whether the weight is stored as (inputs, outputs).
        outputs: the letter o.
        inputs: the letter i, with the bias.
    """

    weight: str
    bias: str | None
    groups: int
    transposed: bool
    outputs: int
    inputs: int

    @staticmethod
    def of(names: Sequence[str], facts: Mapping[str, Tensor]) -> MatrixLayer:
        """The layer of these parameters, weight first, of which ``facts`` are known."""
        return MatrixLayer(
            names[0],
            names[1] if len(names) > 1 else None,
            int(facts["groups"]),
            bool(facts["transposed"]),
            facts["left"].shape[-1],
            facts["right"].shape[-1],
        )

    def factors(self, forms: Forms) -> tuple[Tensor, Tensor] | None:
        """D ``[n, t, o]`` and a ``[n, t, i]``; None where the gradient has no such factors."""
        form = forms.get(self.weight)
        if isinstance(form, Convolved) and self.groups == 1:
            form = form.factored()
        if not isinstance(form, Factored):
            return None
        return form.deltas, form.inputs if self.bias is None else with_ones(form.inputs)

    def single(self, forms: Forms) -> tuple[Tensor, Tensor] | None:
        """The pair d ``[n, o]`` and a ``[n, i]`` of examples of one position; None of others."""
        form = forms.get(self.weight)
        if not isinstance(form, Factored) or form.deltas.shape[1] != 1:
            return None
        inputs = form.inputs if self.bias is None else with_ones(form.inputs)
        return form.deltas[:, 0], inputs[:, 0]

    def times(self, forms: Forms, right: Tensor) -> Tensor:
        """G times a matrix a group ``[g, i, *]``: ``[n, g, o, *]``."""
        form = forms[self.weight]
        inputs = self.inputs - (self.bias is not None)
        if isinstance(form, Convolved) and self.groups == 1:
            product = form.times(right[0, :inputs]).unsqueeze(1)
        elif self.transposed:
            product = (
                form.dense().view(-1, 1, inputs, self.outputs).transpose(2, 3) @ right[:, :inputs]
            )
        else:
            matrices = form.dense().view(-1, self.groups, self.outputs, inputs)
            product = matrices @ right[:, :inputs]
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


def rotated(layer: MatrixLayer, left: Tensor, right: Tensor, forms: Forms) -> Iterable[Tensor]:
    """Q_S^T G Q_A, ``[n, g, o, i]`` in chunks of examples: factors or matrices, the cheaper."""
    o, i, form = layer.outputs, layer.inputs, forms[layer.weight]
    for rows in form.example_slices(2 * layer.groups * o * i):
        some = {name: forms[name].rows(rows) for name in (layer.weight, layer.bias) if name}
        t = _positions(form)
        if t and layer.groups == 1 and t * (o * o + i * i) < o * i * (o + i):
            factors = layer.factors(some)
            assert factors is not None
            deltas, inputs = factors[0] @ left[0], factors[1] @ right[0]
            yield torch.bmm(deltas.transpose(1, 2), inputs).unsqueeze(1)
        else:
            yield left.transpose(1, 2) @ layer.times(some, right)


def _positions(form: Form) -> int:
    """The letter t; 0 where the form has none."""
    if isinstance(form, Convolved):
        return form.positions
    return form.deltas.shape[1] if isinstance(form, Factored) else 0
