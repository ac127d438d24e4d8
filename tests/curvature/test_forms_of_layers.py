"""Covariances under a kernel, rotated and preconditioned gradients, against plain matrices."""

import pytest
import torch
from contract import assert_close
from torch import Tensor
from torch.nn import functional as F

from influence_kit.curvature.eigenbasis import Eigenbasis, Preconditioned
from influence_kit.curvature.kronecker_inverse import KroneckerInverse, Table
from influence_kit.curvature.matrix_layer import MatrixLayer, rotated
from influence_kit.gradients.convolved import Convolved
from influence_kit.gradients.factored import Factored
from influence_kit.gradients.forms import Dense
from influence_kit.gradients.per_example import Gradients
from influence_kit.gradients.rows import Rows
from influence_kit.projections.map_covariance import FEWEST_ROWS, map_products


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def orthogonal(size: int, seed: int) -> Tensor:
    return torch.linalg.qr(draw(size, size, seed=seed))[0]


def convolved(channels: int, outputs: int, side: int, n: int = 3) -> Convolved:
    """Of a 3 x 3 convolution without padding."""
    left, right = draw(n, outputs, side, side), draw(n, channels, side + 2, side + 2, seed=1)
    return Convolved(left, right, torch.Size([outputs, channels, 3, 3]), (1, 1), (1, 1))


@pytest.mark.parametrize("channels", [2, FEWEST_ROWS])
@pytest.mark.parametrize("bias", [False, True])
def test_the_covariance_under_a_kernel(channels: int, bias: bool) -> None:
    form = convolved(channels, 2, 4)
    seen = F.unfold(form.right, 3).transpose(1, 2).flatten(0, 1)
    if bias:
        seen = torch.cat([seen, torch.ones(len(seen), 1).double()], dim=1)
    assert_close(map_products(form, bias)[0], seen.T @ seen, 1e-12)


# positions against channels: factors are rotated, or matrices
@pytest.mark.parametrize(("channels", "outputs", "side"), [(8, 24, 2), (2, 3, 6)])
def test_rotated_gradients_of_a_convolution(channels: int, outputs: int, side: int) -> None:
    form = convolved(channels, outputs, side)
    bias = Dense(form.left.flatten(2).sum(2), torch.Size([outputs]))
    inputs = 9 * channels + 1
    layer = MatrixLayer("w", "b", 1, False, outputs, inputs)
    left, right = orthogonal(outputs, 2), orthogonal(inputs, 3)
    matrices = torch.cat([form.dense().view(3, outputs, -1), bias.values[..., None]], dim=2)
    found = torch.cat(list(rotated(layer, left[None], right[None], {"w": form, "b": bias})))
    assert_close(found[:, 0], left.T @ matrices @ right, 1e-12)


def test_rotated_gradients_of_a_transposed_weight() -> None:
    """Many positions: the matrices are written out."""
    form = Factored(draw(2, 30, 3), draw(2, 30, 4, seed=1), torch.Size([4, 3]), transposed=True)
    layer = MatrixLayer("w", None, 1, True, 3, 4)
    left, right = orthogonal(3, 2), orthogonal(4, 3)
    found = torch.cat(list(rotated(layer, left[None], right[None], {"w": form})))
    matrices = form.deltas.transpose(1, 2) @ form.inputs
    assert_close(found[:, 0], left.T @ matrices @ right, 1e-12)


def preconditioned() -> tuple[Preconditioned, Tensor]:
    """Of a linear layer with a bias, and the same written out as ``[n, o, i]``."""
    form = Factored(draw(5, 2, 3), draw(5, 2, 4, seed=1), torch.Size([3, 4]))
    bias = Dense(form.deltas.sum(1), torch.Size([3]))
    left, right, weights = orthogonal(3, 2), orthogonal(5, 3), draw(3, 5, seed=4).exp()
    layer = MatrixLayer("w", "b", 1, False, 3, 5)
    sizes = torch.ones(1, 3).double(), torch.ones(1, 5).double()
    basis = Eigenbasis(layer, left[None], right[None], weights[None], sizes, 0.0)
    matrices = torch.cat([form.matrices(), bias.values[..., None]], dim=2)
    expected = left @ ((left.T @ matrices @ right) * weights) @ right.T
    return Preconditioned({"w": form, "b": bias}, basis), expected


def test_a_preconditioned_form_is_linear_in_its_source() -> None:
    form, expected = preconditioned()
    factors = draw(5, seed=5)
    assert form.n == 5
    assert form.p == 15
    assert form.sample.dtype == torch.float64
    assert form.joined([form]) is None
    assert_close(form.dense(), expected.flatten(1), 1e-12)
    assert_close(form.rows(slice(1, 3)).dense(), expected[1:3].flatten(1), 1e-12)
    scaled = factors[:, None, None] * expected
    assert_close(form.scaled(factors).dense(), scaled.flatten(1), 1e-12)
    assert_close(form.summed().dense(), expected.sum(0, keepdim=True).flatten(1), 1e-12)
    assert_close(form.squared_norms(), expected.square().sum((1, 2)), 1e-12)
    assert_close(form.inner(form, 5), torch.einsum("moi,noi->mn", expected, expected), 1e-12)
    parts = form.by_parameter("w")
    assert_close(parts["w"], expected[..., :-1].flatten(1), 1e-12)
    assert_close(parts["b"], expected[..., -1], 1e-12)


def test_nothing_meets_an_unused_layer() -> None:
    form, _ = preconditioned()
    assert form.meet({}, "w", 3) is None
    assert form.meet_own({}, "w") is None


def test_a_table_takes_rows_and_written_gradients() -> None:
    ids = torch.tensor([[0, 2, 2], [1, 1, 4]])
    rows = Rows.from_lookups(ids, draw(2, 3, 3), torch.Size([5, 3]))
    right, weights = orthogonal(3, 1), draw(5, 3, seed=2).exp()
    inverse = KroneckerInverse({"w": Table("w", right, weights)})
    expected = ((rows.dense().view(2, 5, 3) @ right) * weights @ right.T).flatten(1)
    for form in (rows, Dense(rows.dense(), rows.shape)):
        gradients = Gradients(2, {"w": form}, {"w": form.shape}, rows.values)
        assert_close(inverse(gradients).forms["w"].dense(), expected, 1e-12)
