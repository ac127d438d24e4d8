"""Kronecker-factored curvature of a layer: the sums accumulated in passes over gradients.

The gradient of a layer's weight, its bias as a last column, is a matrix G = sum_t d_t [a_t, 1]^T
over positions t. K-FAC (arXiv 1503.05671) approximates E[vec G vec G^T] by S (x) A, with

    A = mean over positions of [a, 1] [a, 1]^T,     S = mean over examples of sum_t d_t d_t^T,

each position counting as one example; EK-FAC (arXiv 1806.03884) keeps the eigenvectors Q_S, Q_A
and takes as eigenvalues Lambda = mean over examples of (Q_S^T G Q_A)^2, for whole examples.
Positions of a sequence with a zero gradient (padding) are not counted. Groups of a
convolution are separate matrices. For an embedding G has a row for each id that the example
looked up: A is diagonal over ids, and S the mean over examples of the sum of its rows' squares.
A side longer than ``LARGEST_SIDE`` of ``factor_sums`` has the diagonal of its factor, and its
eigenvectors are the unit vectors. Parameters without such a form have the mean of their squared
gradients.

Shapes: n examples, t positions, g groups, o outputs and i inputs (with the bias) of a group, v
rows and e entries of an embedding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from influence_kit.core.distributed import is_alone, sum_over_ranks
from influence_kit.curvature.factor_sums import FactorSum
from influence_kit.curvature.layer_forms import Kind, kind_of
from influence_kit.curvature.matrix_layer import MatrixLayer, rotated, turned, with_ones
from influence_kit.curvature.passes import refuse_non_finite
from influence_kit.gradients.convolved import Convolved
from influence_kit.gradients.factored import Factored
from influence_kit.gradients.per_example import Gradients
from influence_kit.gradients.rows import Rows
from influence_kit.projections.map_covariance import map_products, map_squares


class Measured(ABC):
    """Sums over gradients of one piece: first the factors, then the grid of eigenvalues."""

    weight: str

    @abstractmethod
    def add_factors(self, gradients: Gradients) -> None:
        """Add a batch to the factors."""

    @abstractmethod
    def decompose(self, n: int) -> None:
        """Compute the eigenvectors, after all batches have been added."""

    @abstractmethod
    def add_squares(self, gradients: Gradients) -> None:
        """Add a batch to the grid of EK-FAC, or to the diagonal."""

    @abstractmethod
    def state(self, n: int, corrected: bool) -> dict[str, Tensor]:
        """Eigenvectors, eigenvalues, and the grid: of EK-FAC if ``corrected``, else of K-FAC."""


class MeasuredMatrix(Measured):
    """The sums of a linear layer or convolution.

    Args:
        layer: the layer.
        kind: the kind of the gradients of its weight.
        sample: a tensor with the dtype and device of the gradients.
        every_position: whether positions of a sequence count also if their gradient is zero.
    """

    def __init__(
        self, layer: MatrixLayer, kind: Kind, sample: Tensor, every_position: bool = False
    ) -> None:
        self.layer, self.weight, self.kind = layer, layer.weight, kind
        g, o, i = layer.groups, layer.outputs, layer.inputs
        self.of_outputs = FactorSum(g, o, sample)
        self.of_inputs = FactorSum(g, i, sample, extra=i - layer.width)
        self.squares = sample.new_zeros((g, o, i), dtype=torch.float64)
        self.positions = sample.new_zeros((1,), dtype=torch.float64)
        self.every_position = every_position
        # rows of inputs that are not summed yet; with several ranks, rows are summed immediately
        self.rows: list[Tensor] = []
        self.few = is_alone() and not self.of_inputs.is_diagonal
        self.sample = sample
        self.left: Tensor | None = None
        self.right: Tensor | None = None

    def add_factors(self, gradients: Gradients) -> None:
        form = gradients.forms.get(self.weight)
        if form is None or kind_of(form) != self.kind:
            return
        if isinstance(form, Convolved):
            self._add_maps(form)
            return
        assert isinstance(form, Factored)
        deltas, inputs = form.deltas, form.inputs
        if self.layer.bias is not None:
            inputs = with_ones(inputs)
        if deltas.shape[1] > 1 and not self.every_position:
            # padding: the gradient is zero there
            counted = (deltas != 0).any(dim=2)
            inputs = inputs * counted.unsqueeze(2)
            self.positions += counted.sum()
        else:
            self.positions += len(deltas) * deltas.shape[1]
        self.of_outputs.add(deltas.flatten(0, 1).T)
        self._add_inputs(inputs.flatten(0, 1))

    def _add_inputs(self, inputs: Tensor) -> None:
        """Add rows ``[*, i]`` to A; as long as there are few, the rows are stored instead of A."""
        self.rows.append(inputs)
        self.few = self.few and sum(map(len, self.rows)) <= self.layer.inputs / 2
        if not self.few:
            for rows in self.rows:
                self.of_inputs.add(rows.T)
            self.rows.clear()

    def _add_maps(self, form: Convolved) -> None:
        g, t, bias = self.layer.groups, form.positions, self.layer.bias is not None
        is_sequence = len(form.shape) == 3 and not self.every_position
        products = map_squares if self.of_inputs.is_diagonal else map_products
        for rows in form.example_slices(form.shape[1] * g * form.kernel * t):
            part = form.rows(rows)
            left = part.left.flatten(2).transpose(0, 1).reshape(g, self.layer.outputs, -1)
            self.of_outputs.add(left)
            # padding of a sequence: the gradient is zero there
            counted = (part.left != 0).any(dim=1) if is_sequence else None
            self.of_inputs.total += products(part, bias, counted)
            self.positions += part.n * t if counted is None else counted.sum()

    def decompose(self, n: int) -> None:
        positions = sum_over_ranks(self.positions).clamp(min=1)
        self.of_outputs.reduce(n)
        self.of_inputs.reduce(positions.view(-1, *[1] * (self.of_inputs.total.dim() - 1)))
        for part in self.rows:
            refuse_non_finite(part)
        self.left_values, left = self.of_outputs.eigenpairs()
        if self.rows:
            right: Tensor | None
            self.right_values, right = _eigenpairs_of_rows(torch.cat(self.rows), positions)
        else:
            self.right_values, right = self.of_inputs.eigenpairs()
        self.left = None if left is None else left.to(self.sample)
        self.right = None if right is None else right.to(self.sample)

    def add_squares(self, gradients: Gradients) -> None:
        if self.weight not in gradients.forms:
            return
        single = self.layer.single(gradients.forms)
        if single is not None:
            deltas = turned(single[0], None if self.left is None else self.left[0])
            inputs = turned(single[1], None if self.right is None else self.right[0])
            self.squares[0] += deltas.square().T @ inputs.square()
            return
        for part in rotated(self.layer, self.left, self.right, gradients.forms):
            self.squares += part.square().sum(0)

    def state(self, n: int, corrected: bool) -> dict[str, Tensor]:
        if corrected:
            grid = sum_over_ranks(self.squares) / n
        else:
            grid = self.left_values.clamp(min=0).unsqueeze(2) * self.right_values.clamp(
                min=0
            ).unsqueeze(1)
        vectors = {"left": self.left, "right": self.right}
        return {
            **{name: value for name, value in vectors.items() if value is not None},
            "left_values": self.left_values,
            "right_values": self.right_values,
            "grid": grid,
            "groups": torch.tensor([self.layer.groups]),
            "transposed": torch.tensor([self.layer.transposed]),
        }


def _eigenpairs_of_rows(rows: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues ``[1, i]`` and vectors ``[1, i, i]`` of rows^T rows / count, for few rows."""
    _, singular, right = torch.linalg.svd(rows.double(), full_matrices=False)
    # without rows, any basis is correct
    basis = torch.linalg.qr(right.T, mode="complete")[0]
    values = basis.new_zeros(len(basis))
    values[: len(singular)] = singular.square() / count
    return values[None], basis[None]


class MeasuredTable(Measured):
    """The sums of an embedding, whose left basis is that of the ids."""

    def __init__(self, weight: str, shape: torch.Size, sample: Tensor) -> None:
        self.weight = weight
        self.counts = sample.new_zeros((shape[0],), dtype=torch.float64)
        self.squares = sample.new_zeros(shape, dtype=torch.float64)
        self.of_entries = FactorSum(1, shape[1], sample)
        self.right: Tensor | None = None
        self.sample = sample

    def add_factors(self, gradients: Gradients) -> None:
        form = gradients.forms.get(self.weight)
        if isinstance(form, Rows):
            counted = (form.values != 0).any(dim=1)
            self.counts += torch.bincount(form.ids[counted], minlength=len(self.counts))
            self.of_entries.add(form.values.T)

    def decompose(self, n: int) -> None:
        self.counts = sum_over_ranks(self.counts)
        self.counts = self.counts / self.counts.sum().clamp(min=1)
        self.of_entries.reduce(n)
        self.right_values, right = self.of_entries.eigenpairs()
        self.right = None if right is None else right[0].to(self.sample)

    def add_squares(self, gradients: Gradients) -> None:
        form = gradients.forms.get(self.weight)
        if isinstance(form, Rows):
            squares = turned(form.values, self.right).square().double()
            self.squares.index_add_(0, form.ids, squares)

    def state(self, n: int, corrected: bool) -> dict[str, Tensor]:
        if corrected:
            grid = sum_over_ranks(self.squares) / n
        else:
            grid = self.counts[:, None] * self.right_values.clamp(min=0)
        return {"grid": grid} if self.right is None else {"right": self.right, "grid": grid}
