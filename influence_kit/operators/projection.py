"""Projections of a layer's gradients that keep them factored."""

from dataclasses import dataclass

import torch
from torch import Tensor

from influence_kit.gradients.factored import Factored
from influence_kit.gradients.forms import Dense, Form
from influence_kit.gradients.per_example import Gradients


@dataclass(frozen=True)
class LayerProjection:
    """The gradient of one linear layer, bias and all, multiplied from both sides.

    ``G = sum_t d_t [a_t, 1]^T`` becomes ``J^T G A = sum_t (J^T d_t) (A^T [a_t, 1])^T``; with J and
    A None it is only put together.

    Args:
        weight: name of the layer's weight.
        bias: name of its bias, None where it does not count (the 1 is then left out).
        deltas: J, ``[o, k]``.
        inputs: A, ``[i + 1, k']`` (``[i, k']`` without bias).
    """

    weight: str
    bias: str | None
    deltas: Tensor | None = None
    inputs: Tensor | None = None

    def __call__(self, gradients: Gradients) -> Gradients:
        """The projected gradients, under the weight's name."""
        outputs, inputs = gradients.parameters[self.weight]
        shape = torch.Size([outputs, inputs + (self.bias is not None)])
        if self.deltas is not None and self.inputs is not None:
            shape = torch.Size([self.deltas.shape[1], self.inputs.shape[1]])
        form = gradients.forms.get(self.weight)
        forms = {}
        if form is not None:
            project = self._factored if isinstance(form, Factored) else self._written
            forms = {self.weight: project(gradients, form, shape)}
        return Gradients(gradients.n, forms, {self.weight: shape}, gradients.sample)

    def _factored(self, gradients: Gradients, form: Form, shape: torch.Size) -> Form:
        assert isinstance(form, Factored)
        deltas, inputs = form.deltas, form.inputs
        if self.bias is not None:
            inputs = torch.cat([inputs, torch.ones_like(inputs[..., :1])], dim=-1)
        if self.deltas is not None and self.inputs is not None:
            deltas, inputs = deltas @ self.deltas, inputs @ self.inputs
        return Factored(deltas, inputs, shape)

    def _written(self, gradients: Gradients, form: Form, shape: torch.Size) -> Form:
        """For a layer whose gradients came without factors."""
        matrices = form.dense().unflatten(1, gradients.parameters[self.weight])
        if self.bias is not None:
            column = gradients.forms[self.bias].dense().unsqueeze(-1)
            matrices = torch.cat([matrices, column], dim=-1)
        if self.deltas is not None and self.inputs is not None:
            matrices = self.deltas.T @ matrices @ self.inputs
        return Dense(matrices.flatten(1), shape)


def random_pair(
    outputs: int, inputs: int, dim: int, seed: int, like: Tensor
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Gaussian matrices for both sides with at most ``dim`` products of their columns.

    Inner products are unbiased: entries have variance 1 / columns. A pair of None where the
    gradient has no more than ``dim`` entries to begin with.
    """
    if outputs * inputs <= dim:
        return None, None
    # by hand and on the CPU: the same numbers on every device, and no global state is moved
    generator = torch.Generator().manual_seed(seed)
    pair = []
    for size in (outputs, inputs):
        columns = min(int(dim**0.5), size)
        matrix = torch.randn(size, columns, generator=generator, dtype=torch.float64)
        pair.append((matrix / columns**0.5).to(like))
    return pair[0], pair[1]
