"""Kronecker-factored curvature of a layer: what is measured of it in passes over gradients.

The gradient of a layer's weight, its bias as a last column, is a matrix G = sum_t d_t [a_t, 1]^T
over positions t. K-FAC (arXiv 1503.05671) takes E[vec G vec G^T] for S (x) A, with

    A = mean over positions of [a, 1] [a, 1]^T,     S = mean over examples of sum_t d_t d_t^T,

each position an example of its own; EK-FAC (arXiv 1806.03884) keeps the eigenvectors Q_S, Q_A and
takes for the eigenvalues Lambda = mean over examples of (Q_S^T G Q_A)^2, over whole examples.
Positions of a sequence at which no gradient arrives (padding) are not counted. Groups of a
convolution are matrices of their own. For an embedding G has a row for each id that the example
looked up: A is diagonal over ids, and S the mean over examples of the sum of its rows' squares.

Letters: n examples, t positions, g groups, o outputs and i inputs (with the bias) of a group, v
rows and e entries of an embedding.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from influence_kit.distributed import from_first_rank, is_alone, sum_over_ranks
from influence_kit.gradients.convolved import Convolved
from influence_kit.gradients.factored import Factored
from influence_kit.gradients.forms import Dense
from influence_kit.gradients.per_example import Gradients
from influence_kit.gradients.rows import Rows
from influence_kit.operators.map_covariance import map_products
from influence_kit.operators.matrix_layer import MatrixLayer, rotated, with_ones
from influence_kit.operators.passes import refuse_non_finite


class Measured(ABC):
    """Sums over gradients of one layer: first the factors, then the grid of eigenvalues."""

    weight: str

    @abstractmethod
    def add_factors(self, gradients: Gradients) -> None:
        """Take a batch into the factors."""

    @abstractmethod
    def decompose(self, n: int) -> None:
        """Find the eigenvectors, once all batches are in."""

    @abstractmethod
    def add_squares(self, gradients: Gradients) -> None:
        """Take a batch into the grid of EK-FAC."""

    @abstractmethod
    def facts(self, n: int, corrected: bool) -> dict[str, Tensor]:
        """Bases, their eigenvalues, and the grid: of EK-FAC if ``corrected``, else of K-FAC."""


class MeasuredMatrix(Measured):
    """Of a linear layer or convolution."""

    def __init__(self, layer: MatrixLayer, sample: Tensor) -> None:
        self.layer, self.weight = layer, layer.weight
        g, o, i = layer.groups, layer.outputs, layer.inputs
        zeros = partial(sample.new_zeros, dtype=torch.float64)
        self.left, self.right, self.squares = zeros((g, o, o)), zeros((g, i, i)), zeros((g, o, i))
        self.positions = zeros((1,))
        # rows of inputs that wait to be added up; ranks add up theirs at once
        self.rows: list[Tensor] = []
        self.few = is_alone()
        self.sample = sample

    def add_factors(self, gradients: Gradients) -> None:
        form = gradients.forms.get(self.weight)
        if form is None:
            return
        if isinstance(form, Convolved):
            self._add_maps(form)
            return
        assert isinstance(form, Factored)
        deltas, inputs = form.deltas, form.inputs
        if self.layer.bias is not None:
            inputs = with_ones(inputs)
        if deltas.shape[1] > 1:
            # padding: no gradient arrives there
            counted = (deltas != 0).any(dim=2)
            inputs = inputs * counted.unsqueeze(2)
            self.positions += counted.sum()
        else:
            self.positions += len(deltas)
        deltas, inputs = deltas.flatten(0, 1), inputs.flatten(0, 1)
        self.left += deltas.T @ deltas
        self._add_inputs(inputs)

    def _add_inputs(self, inputs: Tensor) -> None:
        """Add rows ``[*, i]`` to A; as long as there are few, they are kept in its place."""
        self.rows.append(inputs)
        self.few = self.few and sum(map(len, self.rows)) <= self.layer.inputs / 2
        if not self.few:
            for rows in self.rows:
                self.right += rows.T @ rows
            self.rows.clear()

    def _add_maps(self, form: Convolved) -> None:
        g, t = self.layer.groups, form.positions
        is_sequence = len(form.shape) == 3
        for rows in form.example_slices(form.shape[1] * g * form.kernel * t):
            part = form.rows(rows)
            left = part.left.flatten(2).transpose(0, 1).reshape(g, self.layer.outputs, -1)
            self.left += left @ left.transpose(1, 2)
            # padding of a sequence: no gradient arrives there
            counted = (part.left != 0).any(dim=1) if is_sequence else None
            self.right += map_products(part, self.layer.bias is not None, counted)
            self.positions += part.n * t if counted is None else counted.sum()

    def decompose(self, n: int) -> None:
        for total in (self.left, self.right, self.positions):
            sum_over_ranks(total)
        self.left /= n
        self.right /= self.positions.clamp(min=1)
        for part in (self.left, self.right, *self.rows):
            refuse_non_finite(part)
        self.left_values, left = torch.linalg.eigh(self.left)
        if self.rows:
            self.right_values, right = _eigenpairs_of_rows(torch.cat(self.rows), self.positions)
        else:
            self.right_values, right = torch.linalg.eigh(self.right)
        self.left = from_first_rank(left.contiguous()).to(self.sample)
        self.right = from_first_rank(right.contiguous()).to(self.sample)

    def add_squares(self, gradients: Gradients) -> None:
        if self.weight not in gradients.forms:
            return
        single = self.layer.single(gradients.forms)
        if single is not None:
            deltas, inputs = single[0] @ self.left[0], single[1] @ self.right[0]
            self.squares[0] += deltas.square_().T @ inputs.square_()
            return
        for part in rotated(self.layer, self.left, self.right, gradients.forms):
            self.squares += part.square_().sum(0)

    def facts(self, n: int, corrected: bool) -> dict[str, Tensor]:
        if corrected:
            grid = sum_over_ranks(self.squares) / n
        else:
            grid = self.left_values.clamp(min=0).unsqueeze(2) * self.right_values.clamp(
                min=0
            ).unsqueeze(1)
        return {
            "left": self.left,
            "right": self.right,
            "left_values": self.left_values,
            "right_values": self.right_values,
            "grid": grid,
            "groups": torch.tensor([self.layer.groups]),
            "transposed": torch.tensor([self.layer.transposed]),
        }


def _eigenpairs_of_rows(rows: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues ``[1, i]`` and vectors ``[1, i, i]`` of rows^T rows / count, of few rows."""
    _, singular, right = torch.linalg.svd(rows.double(), full_matrices=False)
    # any basis serves where there are no rows
    basis = torch.linalg.qr(right.T, mode="complete")[0]
    values = basis.new_zeros(len(basis))
    values[: len(singular)] = singular.square() / count.clamp(min=1)
    return values[None], basis[None]


class MeasuredTable(Measured):
    """Of an embedding: the left basis is that of the ids."""

    def __init__(self, weight: str, shape: torch.Size, sample: Tensor) -> None:
        self.weight = weight
        zeros = partial(sample.new_zeros, dtype=torch.float64)
        self.counts, self.right, self.squares = (
            zeros((shape[0],)),
            zeros((shape[1], shape[1])),
            zeros(shape),
        )
        self.sample = sample

    def add_factors(self, gradients: Gradients) -> None:
        form = gradients.forms.get(self.weight)
        if isinstance(form, Rows):
            counted = (form.values != 0).any(dim=1)
            self.counts += torch.bincount(form.ids[counted], minlength=len(self.counts))
            self.right += form.values.T @ form.values

    def decompose(self, n: int) -> None:
        self.counts = sum_over_ranks(self.counts)
        self.right = sum_over_ranks(self.right) / n
        self.counts = self.counts / self.counts.sum().clamp(min=1)
        refuse_non_finite(self.right)
        self.right_values, right = torch.linalg.eigh(self.right)
        self.right = from_first_rank(right.contiguous()).to(self.sample)

    def add_squares(self, gradients: Gradients) -> None:
        form = gradients.forms.get(self.weight)
        if isinstance(form, Rows):
            self.squares.index_add_(0, form.ids, (form.values @ self.right).square().double())

    def facts(self, n: int, corrected: bool) -> dict[str, Tensor]:
        if corrected:
            grid = sum_over_ranks(self.squares) / n
        else:
            grid = self.counts[:, None] * self.right_values.clamp(min=0)
        return {"right": self.right, "grid": grid}


def measured_layer(names: Sequence[str], gradients: Gradients) -> Measured | str | None:
    """What measures a layer, by the kind of its gradients; a word where there is no such form.

    Args:
        names: the layer's chosen parameters.
        gradients: a batch's gradients.

    Returns:
        None where the batch did not use the layer.
    """
    forms = {name: gradients.forms[name] for name in names if name in gradients.forms}
    if not forms:
        return None
    weight = next((name for name in forms if not isinstance(forms[name], Dense)), None)
    if weight is None:
        return "its gradient is not a sum of outer products"
    form, rest = forms[weight], [name for name in names if name != weight]
    if isinstance(form, Rows) and not rest:
        return MeasuredTable(weight, form.shape, gradients.sample)
    if not isinstance(form, Factored | Convolved) or len(rest) > 1:
        return "its parameters are used by layers of several kinds"
    bias = rest[0] if rest else None
    groups = form.groups if isinstance(form, Convolved) else 1
    transposed = isinstance(form, Factored) and form.transposed
    rows, columns = form.shape[0], math.prod(form.shape[1:])
    outputs, inputs = (columns, rows) if transposed else (rows, columns)
    layer = MatrixLayer(
        weight, bias, groups, transposed, outputs // groups, inputs + (bias is not None)
    )
    return MeasuredMatrix(layer, gradients.sample)
