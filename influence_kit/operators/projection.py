"""Projections of a layer's gradients that keep them factored."""

from dataclasses import dataclass

import torch
from torch import Tensor

from influence_kit.gradients.forms import Factored
from influence_kit.gradients.per_example import Gradients


@dataclass(frozen=True)
class LayerProjection:
    """The gradient of one linear layer, bias and all, as one matrix, multiplied from both sides.

    The gradient ``sum_t d_t [a_t, 1]^T`` becomes ``sum_t (J^T d_t) (A^T [a_t, 1])^T``; with J and A
    None it is only put together.

    Args:
        weight: name of the layer's weight.
        counts_bias: whether the 1 is there.
        deltas: J, ``[o, k]``.
        inputs: A, ``[i + 1, k']`` (``[i, k']`` without bias).
    """

    weight: str
    counts_bias: bool
    deltas: Tensor | None = None
    inputs: Tensor | None = None

    def __call__(self, gradients: Gradients) -> Gradients:
        """The projected gradients, under the weight's name."""
        form = gradients.forms[self.weight]
        if not isinstance(form, Factored):
            raise TypeError(f"the gradient of '{self.weight}' has no factors: {type(form).__name__}")
        deltas, inputs = form.deltas, form.inputs
        if self.counts_bias:
            inputs = torch.cat([inputs, torch.ones_like(inputs[..., :1])], dim=-1)
        if self.deltas is not None and self.inputs is not None:
            deltas, inputs = deltas @ self.deltas, inputs @ self.inputs
        shape = torch.Size([deltas.shape[-1], inputs.shape[-1]])
        projected = Factored(deltas, inputs, shape)
        return Gradients(
            gradients.n, {self.weight: projected}, {self.weight: shape}, gradients.sample
        )


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
