"""Influence functions by dense matrices in float64: what the package must equal.

Every method here ends in one matrix M^-1 ``[P, P]`` in the order of the model's parameters, so that
scores are ``h @ inverse @ g.T`` of single-example gradients. Models return a tensor, batches are
``(*inputs, targets)``. Letters: n examples, P parameters, T positions, a input of a layer (with a
trailing 1 for a bias), d gradient of an example's loss at the layer's output.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import oracles
import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

Loss = Callable[[Any, Any], Tensor]
Blocks = Mapping[str, Sequence[str]]


# Parameters as one vector.


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def outputs_at(model: nn.Module, vector: Tensor, batch: Any) -> Tensor:
    """The model's outputs with its parameters taken from a vector; tied ones stay tied."""
    sizes = [p.numel() for p in model.parameters()]
    pieces = vector.split(sizes)
    pairs = zip(model.named_parameters(), pieces, strict=True)
    values = {name: piece.view_as(parameter) for (name, parameter), piece in pairs}
    # the fused kernel has no second derivative
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.functional_call(model, values, tuple(batch[:-1]))


def places(model: nn.Module, names: Sequence[str]) -> Tensor:
    """Where the named parameters are in the vector."""
    starts, start = {}, 0
    for name, parameter in model.named_parameters():
        starts[name] = torch.arange(start, start + parameter.numel())
        start += parameter.numel()
    return torch.cat([starts[name] for name in names])


def blocks_of(model: nn.Module, blocks: str | Blocks, names: Sequence[str] | None = None) -> Blocks:
    """Names of parameters by block: one block, one a module that owns some, or one a parameter."""
    names = [name for name, _ in model.named_parameters()] if names is None else names
    if not isinstance(blocks, str):
        return blocks
    if blocks == "full":
        return {"full": names}
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(name.rpartition(".")[0] if blocks == "layer" else name, []).append(name)
    return found


# Curvatures of the mean loss, [P, P].


def full_hessian(model: nn.Module, batch: Any, loss: Loss) -> Tensor:
    def mean_loss(vector: Tensor) -> Tensor:
        return loss(outputs_at(model, vector, batch), batch[-1]).sum() / oracles.count(batch)

    return hessian(mean_loss, flat(model))


def gauss_newton(model: nn.Module, batch: Any, loss: Loss) -> Tensor:
    """Mean over examples of J^T H J: J of the example's outputs, H of its loss at its outputs."""
    total = torch.zeros((), dtype=torch.float64)
    for i in range(oracles.count(batch)):
        example = oracles.one(batch, i)
        j = jacobian(lambda v, e=example: outputs_at(model, v, e), flat(model))
        outputs = oracles.forward(model, example).detach()
        h = hessian(lambda z, e=example: loss(z, e[-1]).sum(), outputs)
        j, size = j.flatten(0, -2), outputs.numel()
        total = total + j.T @ h.reshape(size, size) @ j
    return total / oracles.count(batch)


def fisher(model: nn.Module, batch: Any, loss: Loss | None = None) -> Tensor:
    """Mean over examples of E[g g^T], the labels of its positions drawn from the softmax.

    Labels of different positions are independent and their gradients have mean zero, so the
    expectation is a sum over positions of one over classes.
    """
    total = torch.zeros((), dtype=torch.float64)
    for i in range(oracles.count(batch)):
        rows, weights = label_gradients(model, oracles.one(batch, i))
        total = total + (rows * weights[:, None]).T @ rows
    return total / oracles.count(batch)


def label_gradients(model: nn.Module, example: Any) -> tuple[Tensor, Tensor]:
    """Of one example: the gradient for every label ``[T * classes, P]``, and its probability."""
    rows = jacobian(lambda v: -outputs_at(model, v, example).log_softmax(-1).flatten(), flat(model))
    return rows, oracles.forward(model, example).detach().softmax(-1).flatten()


def empirical_fisher(model: nn.Module, batch: Any, loss: Loss) -> Tensor:
    g = oracles.gradients(model, batch, loss)
    return g.T @ g / len(g)


CURVATURES: dict[str, Callable[[nn.Module, Any, Loss], Tensor]] = {
    "hessian": full_hessian,
    "ggn": gauss_newton,
    "fisher": fisher,
    "empirical_fisher": empirical_fisher,
}


# Damping.


def eigenvalues(curvature: Tensor) -> Tensor:
    return torch.linalg.eigvalsh((curvature + curvature.T) / 2)


def median_eigenvalue(curvature: Tensor) -> float:
    """The median of the eigenvalues that are not zero up to rounding, by size."""
    sizes = eigenvalues(curvature).abs()
    return sizes[sizes > 1e-10 * sizes.max()].median().item()


def telling_damping(curvature: Tensor) -> float:
    """A damping that leaves the curvature its say: the median eigenvalue.

    Where the curvature has negative eigenvalues, that much above the lowest: the least with which
    C + damping is as well conditioned.
    """
    lowest = eigenvalues(curvature).min().item()
    return median_eigenvalue(curvature) + max(0.0, -lowest)


def auto_damping(
    curvature: Tensor, index: Tensor, share: float = 0.1, count: float = float("inf")
) -> float:
    """A share of the mean eigenvalue of a block, of which ``count`` may differ from zero."""
    trace = curvature[index][:, index].diagonal().sum().item()
    return share * trace / min(len(index), count)


# Inverses, [P, P].


def block_inverse(
    model: nn.Module, curvature: Tensor, blocks: Blocks, damping: float | Mapping[str, float]
) -> Tensor:
    """The inverse of each block of C + damping I; zeros outside the blocks."""
    inverse = torch.zeros_like(curvature)
    for block, names in blocks.items():
        index = places(model, names)
        value = damping[block] if isinstance(damping, Mapping) else damping
        damped = curvature[index][:, index] + value * torch.eye(len(index), dtype=curvature.dtype)
        inverse[index[:, None], index] = torch.linalg.inv(damped)
    return inverse


def datainf_inverse(
    model: nn.Module, g: Tensor, blocks: Blocks, damping: Mapping[str, float]
) -> Tensor:
    """Of each block the mean over examples of (g_j g_j^T + damping I)^-1."""
    inverse = torch.zeros(g.shape[1], g.shape[1], dtype=g.dtype)
    for block, names in blocks.items():
        index = places(model, names)
        eye = torch.eye(len(index), dtype=g.dtype)
        each = [torch.linalg.inv(torch.outer(r, r) + damping[block] * eye) for r in g[:, index]]
        inverse[index[:, None], index] = torch.stack(each).mean(0)
    return inverse


def datainf_damping(model: nn.Module, g: Tensor, blocks: Blocks) -> dict[str, float]:
    """The paper's: a tenth of the mean squared norm of a block's gradients over its size."""
    return {
        block: 0.1 * g[:, places(model, names)].square().mean().item()
        for block, names in blocks.items()
    }


# Scores, [m, n].


def scores(inverse: Tensor, h: Tensor, g: Tensor, relative: str | None = None) -> Tensor:
    """<h, M^-1 g>, over sqrt(g M^-1 g) ("l") or norm(M^-1 g) ("theta") of the training side."""
    solved = g @ inverse.T
    size = {
        None: torch.ones(len(g), dtype=g.dtype),
        "l": (g * solved).sum(1).sqrt(),
        "theta": solved.norm(dim=1),
    }[relative]
    return h @ solved.T / size


# K-FAC and EK-FAC.


@dataclass
class LayerRecord:
    """A layer's inputs ``[T, i]`` and deltas ``[T, o]``, an item an example run alone."""

    inputs: list[Tensor]
    deltas: list[Tensor]
    joined: list[Tensor]
    counted: list[Tensor]

    @property
    def input_factor(self) -> Tensor:
        """Mean over positions of a a^T."""
        a = torch.cat([a[kept] for a, kept in zip(self.inputs, self.counted, strict=True)])
        return a.T @ a / len(a)

    @property
    def delta_factor(self) -> Tensor:
        """Mean over examples of the sum over positions of d d^T."""
        return torch.stack([d.T @ d for d in self.deltas]).mean(0)


def record(model: nn.Module, layer: nn.Module, batch: Any, loss: Loss) -> LayerRecord:
    """What a Linear, Conv2d or Embedding sees of each example.

    Of an embedding the positions of an example are the ids that it looks up, its d their gradients.
    """
    found = LayerRecord([], [], [], [])
    for i in range(oracles.count(batch)):
        inputs, delta = _run_alone(model, layer, oracles.one(batch, i), loss)
        a, d = _positions(layer, inputs, delta)
        found.inputs.append(a)
        found.deltas.append(d)
        found.joined.append(d.T @ a)
        # no gradient arrives at a padded position of a sequence
        sequence = isinstance(layer, nn.Embedding) or (isinstance(layer, nn.Linear) and len(a) > 1)
        arrives = d.abs().sum(1) > 0
        found.counted.append(arrives if sequence else torch.ones_like(arrives))
    return found


def _run_alone(
    model: nn.Module, layer: nn.Module, example: Any, loss: Loss
) -> tuple[Tensor, Tensor]:
    seen = {}

    def keep(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        seen.update(inputs=args[0].detach().clone(), output=output)
        # what follows may change its input in place
        return output.clone()

    handle = layer.register_forward_hook(keep)
    try:
        total = loss(oracles.forward(model, example), example[-1]).sum()
    finally:
        handle.remove()
    (delta,) = torch.autograd.grad(total, seen["output"])
    return seen["inputs"], delta


def _positions(layer: nn.Module, inputs: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(layer, nn.Embedding):
        ids, position = inputs.unique(return_inverse=True)
        sums = F.one_hot(position.flatten(), len(ids)).to(delta).T @ delta.flatten(0, -2)
        return F.one_hot(ids, layer.num_embeddings).to(delta), sums
    if isinstance(layer, nn.Conv2d):
        a = F.unfold(inputs, layer.kernel_size, layer.dilation, layer.padding, layer.stride)[0].T
        d = delta[0].flatten(1).T
    else:
        a, d = inputs.reshape(-1, inputs.shape[-1]), delta.reshape(-1, delta.shape[-1])
    return (a if layer.bias is None else torch.cat([a, a.new_ones(len(a), 1)], dim=1)), d


def parameter_order(layer: nn.Module, shape: torch.Size) -> Tensor:
    """Where the layer's parameters, flattened one after the other, are in vec of ``[o, i]``."""
    index = torch.arange(shape.numel()).view(shape)
    if isinstance(layer, nn.Embedding):
        return index.T.flatten()
    if layer.bias is None:
        return index.flatten()
    return torch.cat([index[:, :-1].flatten(), index[:, -1]])


def kfac_matrix(seen: LayerRecord) -> Tensor:
    """The factors of deltas x inputs, which maps vec(G) of a joined gradient ``[o, i]``."""
    return torch.kron(seen.delta_factor, seen.input_factor)


def ekfac_matrix(seen: LayerRecord, signs: Tensor | None = None) -> Tensor:
    """Q Lambda Q^T: the factors' eigenvectors, mean squares of the gradients along them.

    ``signs`` multiplies the eigenvectors, which must not matter.
    """
    basis = torch.kron(eigenvectors(seen.delta_factor), eigenvectors(seen.input_factor))
    basis = basis if signs is None else basis * signs
    rows = torch.stack([joined.flatten() for joined in seen.joined])
    return basis @ torch.diag((rows @ basis).square().mean(0)) @ basis.T


def eigenvectors(matrix: Tensor) -> Tensor:
    """Columns; the unit vectors of a diagonal matrix, also where its entries are equal."""
    if torch.equal(matrix, matrix.diagonal().diag()):
        return torch.eye(len(matrix), dtype=matrix.dtype)
    return torch.linalg.eigh(matrix).eigenvectors.contiguous()


def kronecker_curvature(
    model: nn.Module,
    batch: Any,
    loss: Loss,
    layers: Sequence[str],
    matrix: Callable[[LayerRecord], Tensor],
) -> Tensor:
    """The layers' matrices as blocks of one ``[P, P]`` in the order of the model's parameters."""
    size = sum(p.numel() for p in model.parameters())
    curvature = torch.zeros(size, size, dtype=torch.float64)
    for name in layers:
        layer = model.get_submodule(name)
        seen = record(model, layer, batch, loss)
        order = parameter_order(layer, seen.joined[0].shape)
        index = places(model, [f"{name}.{own}" for own, _ in layer.named_parameters()])
        curvature[index[:, None], index] = matrix(seen)[order][:, order]
    return curvature
