"""The accumulator of each piece of a block: a matrix, a table, or a diagonal."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from influence_kit.core.distributed import sum_over_ranks
from influence_kit.curvature.diagonal import square_sums
from influence_kit.curvature.kronecker import Measured, MeasuredMatrix, MeasuredTable
from influence_kit.curvature.layer_forms import TABLE, Piece
from influence_kit.curvature.matrix_layer import MatrixLayer
from influence_kit.curvature.passes import refuse_non_finite
from influence_kit.gradients.per_example import Gradients


class MeasuredDiagonal(Measured):
    """For a parameter without a Kronecker form: the mean of its squared gradients."""

    def __init__(self, name: str, shape: torch.Size, sample: Tensor) -> None:
        self.weight = name
        self.squares = sample.new_zeros((math.prod(shape),), dtype=torch.float64)

    def add_factors(self, gradients: Gradients) -> None:
        """A diagonal has no factors."""

    def decompose(self, n: int) -> None:
        """A diagonal has no eigenvectors to compute."""

    def add_squares(self, gradients: Gradients) -> None:
        form = gradients.forms.get(self.weight)
        if form is not None:
            self.squares += square_sums(form)

    def state(self, n: int, corrected: bool) -> dict[str, Tensor]:
        return {"grid": refuse_non_finite(sum_over_ranks(self.squares) / n)}


def measured_piece(
    piece: Piece, shapes: Mapping[str, torch.Size], sample: Tensor, every_position: bool
) -> Measured:
    """The accumulator of a piece of a block.

    Args:
        piece: the piece.
        shapes: the shapes of all parameters.
        sample: a tensor with the dtype and device of the gradients.
        every_position: see ``MeasuredMatrix``.
    """
    shape = shapes[piece.names[0]]
    if piece.kind is None:
        return MeasuredDiagonal(piece.names[0], shape, sample)
    if piece.kind == TABLE:
        return MeasuredTable(piece.names[0], shape, sample)
    _, groups, transposed = (int(part) if part != "matrix" else 0 for part in piece.kind)
    rows, columns = shape[0], math.prod(shape[1:])
    outputs, inputs = (columns, rows) if transposed else (rows, columns)
    weight, bias = (*piece.names, None)[:2]
    assert weight is not None
    wide = inputs + (bias is not None)
    layer = MatrixLayer(weight, bias, groups, bool(transposed), outputs // groups, wide)
    return MeasuredMatrix(layer, piece.kind, sample, every_position)
