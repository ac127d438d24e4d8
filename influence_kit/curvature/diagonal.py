"""The exact diagonal of a parameter's curvature: measured, and its damped inverse.

Shapes: n examples, m test examples, p elements of the parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from influence_kit.core.scaling import exponents, scaled_by_powers
from influence_kit.gradients.factored import Factored
from influence_kit.gradients.form import Form
from influence_kit.gradients.forms import Dense
from influence_kit.gradients.rows import Rows


def square_sums(form: Form) -> Tensor:
    """The sum over examples of each squared gradient, ``[p]`` in float64.

    Gradients are made dense only if needed, in chunks of examples that fit the workspace.
    """
    if isinstance(form, Rows):
        table = form.values.new_zeros(form.shape, dtype=torch.float64)
        return table.index_add_(0, form.ids, form.values.square().double()).flatten()
    if isinstance(form, Factored) and form.deltas.shape[1] == 1:
        deltas, inputs = form.deltas[:, 0].square(), form.inputs[:, 0].square()
        left, right = (inputs, deltas) if form.transposed else (deltas, inputs)
        return (left.T @ right).double().flatten()
    total = form.sample.new_zeros(form.p, dtype=torch.float64)
    for rows in form.example_slices(2 * form.p):
        total += form.rows(rows).dense().square().sum(0)
    return total


@dataclass(frozen=True)
class Diagonal:
    """The damped inverse of a diagonal curvature.

    Args:
        weight: the parameter's name.
        weights: 1 / (diagonal + damping), ``[p]``.
    """

    weight: str
    weights: Tensor

    def __call__(self, form: Form) -> Form:
        """Preconditioned gradients; rows of a table stay rows."""
        if isinstance(form, Rows):
            own = self.weights.view(form.shape)
            return replace(form, values=form.values * own[form.ids])
        if isinstance(form, Dense):
            return replace(form, values=form.values * self.weights)
        return Scaled(form, self.weights)


@dataclass(frozen=True, eq=False)
class Scaled(Form):
    """Gradients times one weight per element, multiplied when they are made dense.

    Args:
        source: the gradients.
        weights: ``[p]``.
    """

    source: Form
    weights: Tensor

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return self.source.shape

    @property
    def n(self) -> int:
        return self.source.n

    @property
    def sample(self) -> Tensor:
        return self.weights

    def _map(self, change: Callable[[Form], Form]) -> Scaled:
        return replace(self, source=change(self.source))

    def dense(self) -> Tensor:
        return self.source.dense() * self.weights

    def rows(self, rows: slice) -> Scaled:
        return self._map(lambda form: form.rows(rows))

    def scaled(self, factors: Tensor) -> Scaled:
        return self._map(lambda form: form.scaled(factors))

    def summed(self) -> Scaled:
        return self._map(lambda form: form.summed())

    def _by_slices(self, change: Callable[[Tensor], Tensor]) -> Tensor:
        """One number per example, computed from its dense gradient."""
        slices = self.example_slices(2 * self.p)
        return torch.cat([change(self.rows(rows).dense()) for rows in slices])

    def squared_norms(self) -> Tensor:
        return self._by_slices(lambda values: values.square().sum(1))

    def balanced(self) -> tuple[Form, Tensor]:
        powers = self._by_slices(exponents)
        return self._map(lambda form: scaled_by_powers(form, -powers)), powers

    def inner(self, test: Form, total: int) -> Tensor:
        parts = [
            Dense(self.rows(rows).dense(), self.shape).inner(test, total)
            for rows in self.example_slices(2 * self.p)
        ]
        return torch.cat(parts, dim=1)

    def joined(self, others: object) -> Form | None:
        return None

    @property
    def nbytes(self) -> int:
        return self.source.nbytes + self.weights.nbytes

    @property
    def has_finite_factors(self) -> bool:
        return self.source.has_finite_factors
