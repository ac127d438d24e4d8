"""The damping by Laplace evidence of K-FAC and EK-FAC by dense matrices, in float64.

Shapes: n examples, P parameters of the model.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import influence_oracles as dense
import oracles
import torch
from torch import Tensor, nn


def root(eigenvalues: Tensor, squared_norm: float, count: float, values: float = math.inf) -> float:
    """The damping at which count (1 - gamma / values) damping |theta|^2 = gamma, by bisection."""
    positive = [max(0.0, value) for value in eigenvalues.tolist()]

    def is_below(log_damping: float) -> bool:
        damping = math.exp(log_damping)
        gamma = math.fsum(value / (value + damping) for value in positive)
        return count * (1 - gamma / values) * damping * squared_norm < gamma

    low, high = -600.0, 600.0
    assert is_below(low)
    assert not is_below(high)
    while high - low > 1e-13 * max(1, abs(low)):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if is_below(middle) else (low, middle)
    return math.exp(low)


@dataclass(frozen=True)
class Counted:
    """N in the units of the loss, and how many values have an estimated variance."""

    count: float
    values: float = math.inf


@dataclass(frozen=True)
class Rule:
    """What "auto" is of a model at its weights.

    Args:
        model: the model, nothing of it frozen.
        loss: one value per example, or per position.
        matrices: layers with a weight matrix: linear ones and convolutions.
        corrected: EK-FAC, or K-FAC.
        tables: embeddings with a Kronecker form.
        names: the parameters that take part; all where None.
    """

    model: nn.Module
    loss: dense.Loss
    matrices: Sequence[str]
    corrected: bool
    tables: Sequence[str] = ()
    names: Sequence[str] | None = None

    def evidence(self, first: Any, counted: Counted, second: Any = None) -> float:
        """Of factors at the labels (or slopes) of ``first``, squares at those of ``second``."""
        curvature = self.curvature(first, second)
        blocks = [self._index(layer) for layer in self.matrices]
        values = torch.cat([dense.eigenvalues(curvature[i][:, i]) for i in blocks])
        weights = torch.cat([dense.flat(self.model)[i] for i in blocks])
        return root(values, float(weights.square().sum()), counted.count, counted.values)

    def rho(
        self,
        damping: float,
        first: Any,
        second: Any = None,
        rows: Tensor | None = None,
    ) -> float:
        """Of the gradients ``rows`` ``[n, P]``; of ``first`` where None. 1 of one example."""
        curvature = self.curvature(first, second)
        g = oracles.gradients(self.model, first, self.loss) if rows is None else rows
        own, n = self._own, len(g)
        if n < 2:
            return 1.0
        a = curvature[own][:, own]
        m = torch.linalg.inv(a + damping * torch.eye(len(own), dtype=a.dtype))
        products = (g[:, own] @ m @ g[:, own].T).square()
        found = float(products.sum() - products.diagonal().sum()) / (n * (n - 1))
        return found / float(torch.trace(m @ a @ m @ a)) - 1

    def damping(
        self, first: Any, counted: Counted, second: Any = None, rows: Tensor | None = None
    ) -> float:
        found = self.evidence(first, counted, second)
        return found / max(1.0, self.rho(found, first, second, rows))

    def curvature(self, first: Any, second: Any = None) -> Tensor:
        """The layers' matrices, and the mean squared gradients of all other parameters."""
        second = first if second is None or not self.corrected else second
        squares = oracles.gradients(self.model, second, self.loss).square().mean(0)
        found = torch.diag(squares)
        for layer in (*self.matrices, *self.tables):
            index = self._index(layer)
            found[index[:, None], index] = self._matrix(layer, first, second)
        return found

    def _matrix(self, layer: str, first: Any, second: Any) -> Tensor:
        module = self.model.get_submodule(layer)
        seen = dense.record(self.model, module, first, self.loss)
        order = dense.parameter_order(module, seen.joined[0].shape)
        if self.corrected:
            again = dense.record(self.model, module, second, self.loss)
            matrix = dense.ekfac_matrix(replace(seen, joined=again.joined))
        else:
            matrix = dense.kfac_matrix(seen)
        return matrix[order][:, order]

    def _index(self, layer: str) -> Tensor:
        module = self.model.get_submodule(layer)
        return dense.places(self.model, [f"{layer}.{own}" for own, _ in module.named_parameters()])

    @property
    def _own(self) -> Tensor:
        every = [name for name, _ in self.model.named_parameters()]
        return dense.places(self.model, every if self.names is None else self.names)
