"""Gradients of single tokens by autograd in float64: every position has weights of its own.

A model is copied, and each leaf module (linear layer, embedding, norm) is replaced by one that
applies T copies of it, one per position of dimension 1. The gradient at the copy of position s is
the part of the gradient that passes through s. Nothing here uses the package.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import oracles
import torch
from torch import Tensor, nn


class ByPosition(nn.Module):
    """Copies of a module, one per position; those of one parameter are the same in all modules."""

    def __init__(self, module: nn.Module, copies: dict[int, list[nn.Parameter]], t: int) -> None:
        super().__init__()
        self.t = t
        self.layers = [copy.copy(module) for _ in range(t)]
        for s, layer in enumerate(self.layers):
            layer._parameters = dict(module._parameters)
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    known = copies.setdefault(
                        id(parameter),
                        [nn.Parameter(parameter.detach().clone()) for _ in range(t)],
                    )
                    layer._parameters[name] = known[s]

    def forward(self, x: Tensor) -> Tensor:
        axis = min(1, x.dim() - 1)  # position ids [t] have no dimension of examples
        assert x.shape[axis] == self.t
        parts = [layer(x.select(axis, s)) for s, layer in enumerate(self.layers)]
        return torch.stack(parts, dim=axis)


def position_gradients(
    model: nn.Module,
    batch: Any,
    loss: Callable[[Any, Any], Tensor],
    t: int,
    names: Sequence[str] | None = None,
) -> Tensor:
    """The part of every example's gradient that passes through each position, ``[n, t, P]``."""
    chosen = dict(model.named_parameters())
    names = list(chosen) if names is None else names
    rows = []
    for i in range(oracles.count(batch)):
        copies: dict[int, list[nn.Parameter]] = {}
        other = replaced(model, copies, t)
        example = oracles.one(batch, i)
        targets = example if isinstance(example, Mapping) else example[-1]
        total = loss(oracles.forward(other, example), targets).sum()
        wanted = [one for name in names for one in copies[id(chosen[name])]]
        found = torch.autograd.grad(total, wanted, allow_unused=True)
        parts = [
            torch.zeros_like(p) if g is None else g for g, p in zip(found, wanted, strict=True)
        ]
        by_name = [torch.stack(parts[k * t : (k + 1) * t]).flatten(1) for k in range(len(names))]
        rows.append(torch.cat(by_name, dim=1))
    return torch.stack(rows)


def replaced(model: nn.Module, copies: dict[int, list[nn.Parameter]], t: int) -> nn.Module:
    """The model with its leaf modules that own parameters applied by position."""
    same = copy.copy(model)
    same._modules = dict(model._modules)
    for name, child in model._modules.items():
        if child is None:
            continue
        if child._parameters and not child._modules:
            same._modules[name] = ByPosition(child, copies, t)
        else:
            same._modules[name] = replaced(child, copies, t)
    return same


def term_gradients(
    model: nn.Module,
    batch: Any,
    terms: Callable[[Any, Any], Tensor],
    names: Sequence[str] | None = None,
) -> Tensor:
    """The gradient of every term of every example, ``[n, t, P]``; ``terms`` returns ``[1, t]``."""
    example = oracles.one(batch, 0)
    targets = example if isinstance(example, Mapping) else example[-1]
    t = terms(oracles.forward(model, example), targets).shape[1]
    found = [
        oracles.gradients(model, batch, lambda outputs, y, s=s: terms(outputs, y)[:, s], names)
        for s in range(t)
    ]
    return torch.stack(found, dim=1)
