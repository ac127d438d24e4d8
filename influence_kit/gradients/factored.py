"""The gradients of a linear layer as factors: outer products of output gradients and inputs.

Shapes: as in ``forms``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeGuard

import torch
from torch import Tensor
from torch.nn.functional import pad

from influence_kit.core.scaling import balanced
from influence_kit.errors import InvalidArgumentError
from influence_kit.gradients.form import Form, element_cost, products, require_tensors, with_formed
from influence_kit.gradients.forms import Dense


@dataclass(frozen=True, eq=False)
class Factored(Form):
    """Gradients ``sum_t deltas[:, t] inputs[:, t]^T`` of a matrix (o, i).

    deltas: ``[n, t, o]``, inputs: ``[n, t, i]``. ``transposed`` if the parameter is stored as
    (i, o).
    """

    deltas: Tensor
    inputs: Tensor
    shape: torch.Size
    transposed: bool = False

    def __post_init__(self) -> None:
        require_tensors(self, deltas=3, inputs=3)
        sizes = self.deltas.shape[2], self.inputs.shape[2]
        size = sizes[::-1] if self.transposed else sizes
        # the kernel of a convolution (o, c, k, k) is a matrix (o, c k k)
        matrix = self.shape[:1].numel(), self.shape[1:].numel()
        if self.deltas.shape[:2] != self.inputs.shape[:2] or matrix != size:
            raise InvalidArgumentError(
                f"a Factored of shape {list(self.shape)} needs deltas [n, t, o] and inputs "
                f"[n, t, i]; got {list(self.deltas.shape)} and {list(self.inputs.shape)}"
            )

    @property
    def n(self) -> int:
        return self.deltas.shape[0]

    @property
    def sample(self) -> Tensor:
        return self.deltas

    @property
    def sizes(self) -> tuple[int, int, int]:
        """The sizes t, o, i."""
        return self.deltas.shape[1], self.deltas.shape[2], self.inputs.shape[2]

    def matrices(self) -> Tensor:
        """The gradients as ``[n, o, i]``, or ``[n, i, o]`` if transposed."""
        left, right = self.deltas, self.inputs
        if self.transposed:
            left, right = right, left
        return torch.bmm(left.transpose(1, 2), right)

    def dense(self) -> Tensor:
        return self.matrices().flatten(1)

    def rows(self, rows: slice) -> Factored:
        return replace(self, deltas=self.deltas[rows], inputs=self.inputs[rows])

    def scaled(self, factors: Tensor) -> Factored:
        return replace(self, deltas=self.deltas * factors[:, None, None])

    def summed(self) -> Form:
        # the positions of all examples become the positions of a single one
        deltas, inputs = self.deltas.flatten(0, 1)[None], self.inputs.flatten(0, 1)[None]
        return replace(self, deltas=deltas, inputs=inputs).compact()

    def compact(self) -> Form:
        t, o, i = self.sizes
        return self if t * (o + i) <= o * i else Dense(self.dense(), self.shape)

    def squared_norms(self) -> Tensor:
        t, o, i = self.sizes
        if t == 1:
            return (self.deltas.square().sum(2) * self.inputs.square().sum(2)).squeeze(1)
        if t * (o + i) + element_cost(self.deltas) * t < o * i:
            parts = []
            for rows in self.example_slices(2 * t * t):
                d, a = self.deltas[rows], self.inputs[rows]
                gram = torch.bmm(d, d.transpose(1, 2))
                parts.append(gram.mul_(torch.bmm(a, a.transpose(1, 2))).sum((1, 2)))
            return torch.cat(parts)
        return torch.cat(
            [self.rows(r).matrices().square().sum((1, 2)) for r in self.example_slices(o * i)]
        )

    def balanced(self) -> tuple[Form, Tensor]:
        deltas, of_deltas = balanced(self.deltas)
        inputs, of_inputs = balanced(self.inputs)
        return replace(self, deltas=deltas, inputs=inputs), of_deltas + of_inputs

    def combined(self, weights: Tensor) -> Tensor:
        t, o, i = self.sizes
        k, touch, step = len(weights), element_cost(weights), self.rows_of_workspace(self.p)
        # each cost: per example and matrix entry; sums are read and written once per chunk
        forming = 2 * t + touch + 2 * k + 2 * touch * k / step
        if forming <= 2 * t * k:
            return super().combined(weights)
        inputs = self.inputs.flatten(0, 1)
        found = weights.new_empty(k, *((i, o) if self.transposed else (o, i)))
        for index, row in enumerate(weights):
            deltas = (self.deltas * row[:, None, None]).flatten(0, 1)
            left, right = (inputs, deltas) if self.transposed else (deltas, inputs)
            found[index] = left.T @ right
        return found.flatten(1)

    def inner(self, test: Form, total: int) -> Tensor:
        t, o, i = self.sizes
        touch, m = element_cost(self.deltas), test.n
        # each cost: per training example
        forming: float = 2 * t * o * i + 2 * touch * o * i + 2 * m * o * i
        along: float = 2 * m * t * o * i + 2 * touch * m * t * min(o, i)
        plans = {self._inner_forming: forming, self._inner_along: along}
        if isinstance(test, Factored) and test.transposed == self.transposed:
            s = test.sizes[0]
            plans[self._inner_gram] = 2 * m * t * s * (o + i) + 3 * touch * m * t * s
            if "formed" not in test.__dict__:
                to_form = m * (2 * s + 2 * touch) * o * i / max(total, self.n)
                plans[self._inner_forming] += to_form
                plans[self._inner_along] += to_form
        return min(plans, key=plans.__getitem__)(test)

    def _inner_gram(self, test: Form) -> Tensor:
        """Sum over positions of (inputs . inputs) (deltas . deltas); no gradient is formed."""
        assert isinstance(test, Factored)
        t, s, m = self.sizes[0], test.sizes[0], test.n
        if t == s == 1:
            product = test.deltas[:, 0] @ self.deltas[:, 0].T
            return product.mul_(test.inputs[:, 0] @ self.inputs[:, 0].T)
        test_deltas, test_inputs = test.deltas.flatten(0, 1), test.inputs.flatten(0, 1)
        parts = []
        for rows in self.example_slices(2 * m * t * s):
            product = test_deltas @ self.deltas[rows].flatten(0, 1).T
            product.mul_(test_inputs @ self.inputs[rows].flatten(0, 1).T)
            parts.append(product.view(m, s, -1, t).sum((1, 3)))
        return torch.cat(parts, dim=1)

    def _inner_forming(self, test: Form) -> Tensor:
        """Form the training gradients chunk by chunk, with one matrix product per chunk."""

        def product(formed: Tensor) -> Tensor:
            chunks = self.example_slices(self.p)
            parts = [products(formed, self.rows(rows).dense()) for rows in chunks]
            return torch.cat(parts, dim=1)

        return with_formed(test, product)

    def _inner_along(self, test: Form) -> Tensor:
        """Deltas . (V inputs) for each test gradient V: no training gradient is formed."""
        t, o, i = self.sizes

        def product(formed: Tensor) -> Tensor:
            v = formed.view(-1, i, o) if self.transposed else formed.view(-1, o, i).transpose(1, 2)
            parts = []
            for rows in self.example_slices(len(v) * t * min(o, i)):
                d, a = self.deltas[rows].flatten(0, 1), self.inputs[rows].flatten(0, 1)
                if o <= i:
                    along = torch.matmul(a, v).mul_(d)
                else:
                    along = torch.matmul(d, v.transpose(1, 2)).mul_(a)
                parts.append(along.sum(2).view(len(v), -1, t).sum(2))
            return torch.cat(parts, dim=1)

        return with_formed(test, product)

    def joined(self, others: Sequence[Form]) -> Form | None:
        alike = [f for f in (self, *others) if self._is_like(f)]
        if len(alike) <= len(others):
            return None
        # shorter sequences are padded with zeros, which add nothing
        t = max(f.deltas.shape[1] for f in alike)
        deltas = [pad(f.deltas, (0, 0, 0, t - f.deltas.shape[1])) for f in alike]
        inputs = [pad(f.inputs, (0, 0, 0, t - f.inputs.shape[1])) for f in alike]
        return replace(self, deltas=torch.cat(deltas), inputs=torch.cat(inputs))

    def plus(self, other: Form) -> Form | None:
        if not self._is_like(other):
            return None
        deltas = torch.cat([self.deltas, other.deltas], dim=1)
        return replace(self, deltas=deltas, inputs=torch.cat([self.inputs, other.inputs], dim=1))

    def _is_like(self, other: Form) -> TypeGuard[Factored]:
        return isinstance(other, Factored) and other.transposed == self.transposed
