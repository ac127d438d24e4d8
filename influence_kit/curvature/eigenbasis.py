"""The inverse of a damped Kronecker-factored curvature, applied to test gradients.

A layer's test gradients become ``Q_S [(Q_S^T G Q_A) / (Lambda + damping)] Q_A^T``. Their products
with training gradients are taken in the cheaper basis. If neither test nor training examples have
more than one position, the grid W = 1 / (Lambda + damping) may be replaced by a few outer products
that all pairs share: the singular vectors of W weighted by the typical size of the factors that it
multiplies. The error is estimated over all pairs of every training batch; if it is above ``rtol``,
the exact product is taken.

Shapes: m test examples, n training examples, s and t their positions, g groups, o outputs and i
inputs (with the bias) of a layer, r outer products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from influence_kit.core.memory import rows_within, workspace_bytes
from influence_kit.core.scaling import exponents, scaled_by_powers
from influence_kit.curvature.matrix_layer import Forms, MatrixLayer, rotated, turned
from influence_kit.gradients.factored import Factored
from influence_kit.gradients.form import Form
from influence_kit.gradients.forms import Dense

# random sums for the estimate of the error of the shared form
PROBES = 4
# smaller sizes relative to the largest are raised to this; smaller singular values are noise
SMALLEST, NOISE = 1e-10, 1e-13


@dataclass(frozen=True)
class Shared:
    """W ``[o, i]`` as sum_r u_r v_r^T and a remainder.

    Args:
        left, right: u ``[r, o]`` and v ``[r, i]``.
        rest: the remainder, ``[o, i]``.
    """

    left: Tensor
    right: Tensor
    rest: Tensor


@dataclass(frozen=True)
class Eigenbasis:
    """The eigenvectors of one layer's curvature and the damped inverse of its eigenvalues.

    Args:
        layer: the layer.
        left, right: Q_S ``[g, o, o]`` and Q_A ``[g, i, i]``; None for the unit vectors.
        weights: W, ``[g, o, i]``.
        sizes: the eigenvalues of S ``[g, o]`` and A ``[g, i]``: the mean squares of the factors
            that W multiplies.
        rtol: the largest relative error of the shared form; 0 for exact products.
    """

    layer: MatrixLayer
    left: Tensor | None
    right: Tensor | None
    weights: Tensor
    sizes: tuple[Tensor, Tensor]
    rtol: float

    def factors(self, deltas: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """D ``[..., o]`` and a ``[..., i]`` of a layer with one group, in the eigenbasis."""
        left, right = (None if side is None else side[0] for side in (self.left, self.right))
        return turned(deltas, left), turned(inputs, right)

    def restored(self, matrices: Tensor) -> Tensor:
        """Matrices ``[n, g, o, i]`` in the eigenbasis, in the basis of the parameters."""
        if self.right is not None:
            matrices = matrices @ self.right.transpose(1, 2)
        return matrices if self.left is None else self.left @ matrices

    @property
    def turning_costs(self) -> tuple[int, int]:
        """Multiplications per entry of a matrix to rotate its columns, and its rows."""
        o, i = self.weights.shape[1:]
        return o * (self.left is not None), i * (self.right is not None)

    @cached_property
    def shared(self) -> Shared | None:
        """The grid W as a few outer products; None if they would be too many."""
        is_long = self.left is None or self.right is None
        if self.rtol <= 0 or self.layer.groups > 1 or is_long:
            return None
        # directions of size zero do not matter; the floor keeps the division finite
        scales = [size[0].clamp(min=SMALLEST * float(size.max())) for size in self.sizes]
        if not all(bool((scale > 0).all()) for scale in scales):
            return None
        weighted = scales[0][:, None] * self.weights[0].double() * scales[1]
        left, values, right = torch.linalg.svd(weighted, full_matrices=False)
        tails = values.square().flip(0).cumsum(0).flip(0).sqrt()
        rank = int((tails > 0.1 * self.rtol * tails[0]).sum())
        o, i = self.weights.shape[1:]
        if rank * (o + i) > o * i / 2 or float(values[rank - 1]) < NOISE * float(values[0]):
            return None
        roots = values[:rank].sqrt()
        u, v = (left[:, :rank] * roots).T / scales[0], right[:rank] * roots[:, None] / scales[1]
        rest = self.weights[0].double() - u.T @ v
        return Shared(u.to(self.weights), v.to(self.weights), rest.to(self.weights))


@dataclass(frozen=True, eq=False)
class Preconditioned(Form):
    """Preconditioned gradients of a layer, weight and bias together; multiplied when needed.

    Args:
        source: the gradients, by parameter.
        basis: the layer's eigenvectors and weights.
    """

    source: Forms
    basis: Eigenbasis

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """The shape of a flattened matrix of the layer."""
        return torch.Size([self.basis.weights.numel()])

    @property
    def n(self) -> int:
        return self.source[self.basis.layer.weight].n

    @property
    def sample(self) -> Tensor:
        return self.basis.weights

    def _map(self, change: Callable[[Form], Form]) -> Preconditioned:
        return replace(self, source={name: change(form) for name, form in self.source.items()})

    def rows(self, rows: slice) -> Preconditioned:
        return self._map(lambda form: form.rows(rows))

    def scaled(self, factors: Tensor) -> Preconditioned:
        return self._map(lambda form: form.scaled(factors))

    def summed(self) -> Preconditioned:
        return self._map(lambda form: form.summed())

    def joined(self, others: Sequence[Form]) -> Form | None:
        return None

    def _rotated(self, forms: Forms) -> Tensor:
        """Gradients in the eigenbasis, ``[n, g, o, i]``."""
        basis = self.basis
        return torch.cat(list(rotated(basis.layer, basis.left, basis.right, forms)))

    @cached_property
    def weighted(self) -> Tensor:
        """The gradients in the eigenbasis times W, ``[m, g, o, i]``."""
        return self._rotated(self.source).mul_(self.basis.weights)

    @cached_property
    def matrices(self) -> Tensor:
        """The preconditioned gradients in the basis of the parameters, ``[m, g, o, i]``."""
        return self.basis.restored(self.weighted)

    @cached_property
    def _parts(self) -> dict[str, Dense]:
        shapes = {name: form.shape for name, form in self.source.items()}
        split = self.basis.layer.split(self.matrices).items()
        return {name: Dense(values.contiguous(), shapes[name]) for name, values in split}

    def dense(self) -> Tensor:
        return self.matrices.flatten(1)

    def by_parameter(self, name: str) -> dict[str, Tensor]:
        return {name: part.values for name, part in self._parts.items()}

    def squared_norms(self) -> Tensor:
        return self.weighted.square().sum((1, 2, 3))

    @property
    def has_finite_factors(self) -> bool:
        return all(form.has_finite_factors for form in self.source.values())

    def balanced(self) -> tuple[Form, Tensor]:
        powers = exponents(self.weighted)
        if not bool(powers.any()):
            return self, powers
        return self._map(lambda form: scaled_by_powers(form, -powers)), powers

    def inner(self, test: Form, total: int) -> Tensor:
        return Dense(self.dense(), self.shape).inner(test, total)

    def meet_own(self, others: Mapping[str, Form], name: str) -> Tensor | None:
        if name not in others:
            return None
        layer = self.basis.layer
        mine, theirs = (self._single(forms) for forms in (self.source, others))
        if mine is not None and theirs is not None:
            grid = self.basis.weights[0]
            return ((mine[0] * theirs[0]) @ grid * (mine[1] * theirs[1])).sum(1)
        chunks = zip(
            rotated(layer, self.basis.left, self.basis.right, self.source),
            rotated(layer, self.basis.left, self.basis.right, others),
            strict=True,
        )
        return torch.cat([(a * b * self.basis.weights).sum((1, 2, 3)) for a, b in chunks])

    def _single(self, forms: Mapping[str, Form]) -> tuple[Tensor, Tensor] | None:
        """Rotated d ``[n, o]`` and a ``[n, i]`` of gradients of one position; None for others."""
        single = self.basis.layer.single(forms)
        if single is None:
            return None
        return self.basis.factors(*single)

    @cached_property
    def _own_single(self) -> tuple[Tensor, Tensor] | None:
        return self._single(self.source)

    def meet(self, train: Mapping[str, Form], name: str, total: int) -> Tensor | None:
        form = train.get(name)
        if form is None:
            return None
        if not isinstance(form, Factored) or not self._rotate_train(form, total):
            return self._meet_parameters(train, total)
        factors = self.basis.layer.factors(train)
        assert factors is not None
        deltas, inputs = self.basis.factors(*factors)
        exact = Factored(deltas, inputs, self.basis.weights.shape[1:])
        scores = self._meet_shared(exact)
        return exact.inner(self._in_eigenbasis, total) if scores is None else scores

    def _rotate_train(self, form: Factored, total: int) -> bool:
        """Whether to rotate the training factors, rather than the test gradients back."""
        t, o, i = form.deltas.shape[1], self.basis.layer.outputs, self.basis.layer.inputs
        rows, columns = self.basis.turning_costs
        turning = t * (o * rows + i * columns) * max(total, form.n)
        return turning < self.n * o * i * (rows + columns)

    def _meet_parameters(self, train: Mapping[str, Form], total: int) -> Tensor:
        found = [
            train[name].inner(part, total) for name, part in self._parts.items() if name in train
        ]
        return sum(found[1:], found[0])

    @cached_property
    def _in_eigenbasis(self) -> Dense:
        return Dense(self.weighted.flatten(1), self.basis.weights.shape[1:])

    def _meet_shared(self, train: Factored) -> Tensor | None:
        """Products by the shared outer products; None if not applicable or too inaccurate."""
        own = self._own_single
        if own is None or train.deltas.shape[1] != 1 or self.basis.shared is None:
            return None
        scores = _through_vectors(own, train, self.basis.shared)
        error = _error_of_vectors(own, train, self.basis.shared.rest)
        return scores if error <= self.basis.rtol * float(scores.norm()) else None


def _error_of_vectors(test: tuple[Tensor, Tensor], train: Factored, rest: Tensor) -> float:
    """An estimate of the norm of the errors of all pairs, given the remainder ``rest`` of W.

    For random signs r_n the expectation of (sum_n r_n error_mn)^2 is the sum of squares, and the
    sum over n makes one matrix of all training examples.
    """
    deltas, inputs = train.deltas[:, 0], train.inputs[:, 0]
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    for _ in range(PROBES):
        signs = torch.randint(0, 2, (len(deltas), 1), generator=generator).to(deltas) * 2 - 1
        grid = rest * (deltas.T @ (inputs * signs))
        total += float(((test[0] @ grid) * test[1]).sum(1).square().sum())
    return math.sqrt(total / PROBES)


def _through_vectors(test: tuple[Tensor, Tensor], train: Factored, shared: Shared) -> Tensor:
    """sum_oi d_o d'_o W_oi a_i a'_i for each pair ``[m, n]``, W = sum_r u_r v_r^T."""
    scores = train.deltas.new_zeros(train.n, len(test[0]))
    step = rows_within(workspace_bytes(scores.device), 3 * scores.element_size() * scores.shape[1])
    for start in range(0, train.n, step):
        rows = slice(start, start + step)
        deltas, inputs = train.deltas[rows, 0], train.inputs[rows, 0]
        for u, v in zip(shared.left, shared.right, strict=True):
            part = deltas @ (test[0] * u).T
            scores[rows].addcmul_(part, inputs @ (test[1] * v).T)
    return scores.T
