"""K-FAC and EK-FAC of a whole model by dense blocks: what the package must equal, in float64.

Every example is run alone. A layer that is said to have a Kronecker form has the eigenvectors of
the covariances of its inputs and of its output gradients, seen by hooks; its dense inverse is
written out. Every other parameter has the mean of its squared gradients. Nothing here uses the
package.

Shapes: n examples, t positions, r rows and c columns of a layer's matrix, with the bias.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import oracles
import slope_oracle
import torch
from torch import Tensor, nn
from torch.nn import functional as F

Loss = Callable[[Any, Any], Tensor]


@dataclass
class Seen:
    """Of a model: gradients by parameter ``[n, *shape]``; of each layer inputs and deltas."""

    gradients: dict[str, Tensor]
    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    deltas: dict[str, list[Tensor]] = field(default_factory=dict)


def look(model: nn.Module, batch: Any, loss: Loss, layers: Sequence[str] = ()) -> Seen:
    named = dict(model.named_parameters())
    rows: dict[str, list[Tensor]] = {name: [] for name in named}
    seen = Seen({}, {name: [] for name in layers}, {name: [] for name in layers})
    for i in range(oracles.count(batch)):
        example, calls = oracles.one(batch, i), {}
        handles = [
            model.get_submodule(name).register_forward_hook(_keeper(calls, name)) for name in layers
        ]
        targets = example if isinstance(example, Mapping) else example[-1]
        total = loss(oracles.forward(model, example), targets).sum()
        for handle in handles:
            handle.remove()
        wanted = [*named.values(), *(calls[name][1] for name in calls)]
        found = list(torch.autograd.grad(total, wanted, allow_unused=True))
        for (name, parameter), gradient in zip(named.items(), found, strict=False):
            rows[name].append(torch.zeros_like(parameter) if gradient is None else gradient)
        for name, delta in zip(calls, found[len(named) :], strict=True):
            layer = model.get_submodule(name)
            a, d = positions(layer, calls[name][0], delta)
            seen.inputs[name].append(a)
            seen.deltas[name].append(d)
    seen.gradients = {name: torch.stack(parts).detach() for name, parts in rows.items()}
    return seen


def _keeper(calls: dict[str, Any], name: str) -> Any:
    def keep(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        calls[name] = (args[0].detach().clone(), output)
        return output.clone()  # what follows may change its input in place

    return keep


def positions(layer: nn.Module, inputs: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs ``[t, i]`` and output gradients ``[t, o]`` of one example, without padding."""
    if isinstance(layer, nn.Embedding):
        ids, place = inputs.flatten().unique(return_inverse=True)
        d = F.one_hot(place, len(ids)).to(delta).T @ delta.reshape(-1, delta.shape[-1])
        a = F.one_hot(ids, layer.num_embeddings).to(delta)
    elif isinstance(layer, nn.Conv2d):
        a = F.unfold(inputs, layer.kernel_size, layer.dilation, layer.padding, layer.stride)[0].T
        return a, delta[0].flatten(1).T
    elif isinstance(layer, nn.ConvTranspose2d):
        size = (layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        return inputs[0].flatten(1).T, F.unfold(delta, *size)[0].T
    else:
        a, d = inputs.reshape(-1, inputs.shape[-1]), delta.reshape(-1, delta.shape[-1])
    arrives = (d != 0).any(1) if len(d) > 1 or isinstance(layer, nn.Embedding) else slice(None)
    return a[arrives], d[arrives]


def matrices(layer: nn.Module, weights: Tensor, bias: Tensor | None) -> Tensor:
    """The gradients of a layer's weight, and its bias as a last column: ``[n, r, c]``."""
    found = weights.flatten(2)
    if type(layer).__name__ == "Conv1D":  # stored as (inputs, outputs)
        found = found.transpose(1, 2)
    return found if bias is None else torch.cat([found, bias[:, :, None]], dim=2)


def eigenpairs(matrix: Tensor, limit: int, size: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues and vectors; of a long side the diagonal and the unit vectors."""
    if size > limit or torch.equal(matrix, matrix.diagonal().diag()):
        return matrix.diagonal(), torch.eye(len(matrix), dtype=matrix.dtype)
    values, vectors = torch.linalg.eigh(matrix)
    return values.clamp(min=0), vectors.contiguous()


@dataclass(frozen=True)
class Oracle:
    """The scores of a model.

    Args:
        model: the model.
        loss: one value for each example (or for each of its positions).
        layers: those with a Kronecker form, each with whether its bias joins its weight.
        corrected: EK-FAC, or K-FAC.
        damping: by block, or one for all.
        limit: the longest side with eigenvectors.
        left_out: whether the other parameters take no part.
    """

    model: nn.Module
    loss: Loss
    layers: Mapping[str, bool]
    corrected: bool
    damping: float | Mapping[str, float]
    limit: int = 8192
    left_out: bool = False

    def scores(self, test: Any, train: Any, first: Any = None, second: Any = None) -> Tensor:
        """``[m, n]``; factors at the slopes of ``first``, squares at those of ``second``.

        The targets of those two are slopes; without them, both are at the labels of ``train``.
        """
        loss = self.loss if first is None else slope_oracle.products
        first = train if first is None else first
        second = first if second is None or not self.corrected else second
        seen = look(self.model, first, loss, list(self.layers))
        squares = look(self.model, second, loss).gradients
        g, h = (look(self.model, batch, self.loss).gradients for batch in (train, test))
        total, done = torch.zeros((), dtype=torch.float64), set()
        for layer, joins in self.layers.items():
            names = [f"{layer}.weight", *([f"{layer}.bias"] if joins else [])]
            rows = [self._matrices(layer, names, x).flatten(1) for x in (h, g)]
            inverse = self._inverse(layer, names, seen, squares)
            total = total + rows[0] @ inverse @ rows[1].T
            done |= set(names)
        for name in g:
            if name in done or self.left_out:
                continue
            diagonal = squares[name].flatten(1).square().mean(0)
            inverse = torch.diag(1 / (diagonal + self._damping(name)))
            total = total + h[name].flatten(1) @ inverse @ g[name].flatten(1).T
        return total

    def _damping(self, name: str) -> float:
        if isinstance(self.damping, Mapping):
            return self.damping[name.rpartition(".")[0] or name]
        return self.damping

    def _matrices(self, layer: str, names: Sequence[str], found: Mapping[str, Tensor]) -> Tensor:
        bias = found[names[1]] if len(names) > 1 else None
        return matrices(self.model.get_submodule(layer), found[names[0]], bias)

    def _inverse(
        self, layer: str, names: Sequence[str], seen: Seen, squares: Mapping[str, Tensor]
    ) -> Tensor:
        """The layer's dense inverse ``[r * c, r * c]``."""
        a = torch.cat(seen.inputs[layer])
        if len(names) > 1:
            a = torch.cat([a, a.new_ones(len(a), 1)], dim=1)
        width = a.shape[1] - (len(names) - 1)
        of_inputs = eigenpairs(a.T @ a / len(a), self.limit, width)
        n = len(next(iter(seen.gradients.values())))
        covariance = torch.stack([d.T @ d for d in seen.deltas[layer]]).sum(0) / n
        of_deltas = eigenpairs(covariance, self.limit, len(covariance))
        module = self.model.get_submodule(layer)
        swapped = isinstance(module, nn.Embedding | nn.ConvTranspose2d)
        left, right = (of_inputs, of_deltas) if swapped else (of_deltas, of_inputs)
        if self.corrected:
            turned = left[1].T @ self._matrices(layer, names, squares) @ right[1]
            grid = turned.square().mean(0)
        else:
            grid = torch.outer(left[0], right[0])
        basis = torch.kron(left[1], right[1])
        return basis @ torch.diag(1 / (grid.flatten() + self._damping(names[0]))) @ basis.T
