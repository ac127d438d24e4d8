"""Diagonals of curvatures: sums of squares, and their inverse, against gradients written out."""

import pytest
import torch
from contract import assert_close
from torch import Tensor
from torch.nn import functional as F

from influence_kit.core.distributed import texts_of_ranks
from influence_kit.curvature import factor_sums
from influence_kit.curvature.diagonal import Diagonal, Scaled, square_sums
from influence_kit.curvature.factor_sums import FactorSum
from influence_kit.curvature.layer_forms import (
    NOT_USED,
    SEVERAL_KINDS,
    ObservedForms,
    is_bias_of,
)
from influence_kit.gradients import form as forms_base
from influence_kit.gradients.convolved import Convolved
from influence_kit.gradients.factored import Factored
from influence_kit.gradients.form import Form
from influence_kit.gradients.forms import Dense, Sum
from influence_kit.gradients.per_example import Gradients
from influence_kit.gradients.rows import Rows
from influence_kit.projections.map_covariance import map_products, map_squares


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


N, SHAPE = 5, torch.Size([6, 4])


def rows(seed: int = 0) -> Rows:
    ids = torch.tensor([[0, 2, 2], [1, 1, 4], [5, 0, 3], [2, 2, 2], [4, 1, 0]])
    return Rows.from_lookups(ids, draw(N, 3, 4, seed=seed), SHAPE)


def factored(t: int, transposed: bool = False) -> Factored:
    o, i = (4, 6) if transposed else (6, 4)
    return Factored(draw(N, t, o), draw(N, t, i, seed=1), SHAPE, transposed)


def convolved(groups: int = 1) -> Convolved:
    left, right = draw(N, 4, 3, 3), draw(N, 4, 5, 5, seed=1)
    shape = torch.Size([4, 4 // groups, 3, 3])
    return Convolved(left, right, shape, (1, 1), (1, 1), groups)


FORMS = {
    "dense": Dense(draw(N, 24), SHAPE),
    "one position": factored(1),
    "one position, transposed": factored(1, transposed=True),
    "positions": factored(3),
    "positions, transposed": factored(3, transposed=True),
    "rows": rows(),
    "convolved": convolved(),
    "groups": convolved(2),
    "a sum": Sum((rows(), factored(3))),
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


@every_form
@pytest.mark.parametrize("workspace", [1, 1 << 24])
def test_sums_of_squares(form: Form, workspace: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one example at a time."""
    monkeypatch.setattr(forms_base, "workspace_bytes", lambda device: workspace)
    found = square_sums(form)
    assert found.dtype == torch.float64
    assert_close(found, form.dense().square().sum(0), 1e-12)


@every_form
def test_gradients_through_a_diagonal(form: Form) -> None:
    weights = draw(form.p, seed=3).exp()
    found, expected = Diagonal("w", weights)(form), form.dense() * weights
    assert isinstance(found, Rows) == isinstance(form, Rows)
    assert found.n == N
    assert found.shape == form.shape
    assert_close(found.dense(), expected, 1e-12)
    assert_close(form.inner(found, N), expected @ form.dense().T, 1e-12)
    assert_close(found.meet({"w": form}, "w", N), expected @ form.dense().T, 1e-12)
    own = found.meet_own({"w": form}, "w")
    assert_close(own, (expected * form.dense()).sum(1), 1e-12)
    assert_close(found.inner(found, N), expected @ expected.T, 1e-12)


def test_a_scaled_form_is_linear_in_its_source() -> None:
    weights, factors = draw(24, seed=3).exp(), draw(N, seed=4)
    form = Diagonal("w", weights)(factored(3))
    assert isinstance(form, Scaled)
    expected = factored(3).dense() * weights
    assert form.sample is weights
    assert form.joined([form]) is None
    assert form.has_finite_factors
    assert form.nbytes == factored(3).nbytes + weights.nbytes
    assert_close(form.rows(slice(1, 3)).dense(), expected[1:3], 1e-12)
    assert_close(form.scaled(factors).dense(), expected * factors[:, None], 1e-12)
    assert_close(form.summed().dense(), expected.sum(0, keepdim=True), 1e-12)
    assert_close(form.squared_norms(), expected.square().sum(1), 1e-12)
    assert_close(form.by_parameter("w")["w"], expected, 1e-12)


@pytest.mark.parametrize("size", [1e-150, 1.0, 1e150])
def test_scaled_gradients_whose_squares_do_not_exist(size: float) -> None:
    source = factored(3).scaled(torch.full((N,), size, dtype=torch.float64))
    form = Diagonal("w", draw(24, seed=3).exp())(source)
    found, powers = form.balanced()
    assert torch.isfinite(found.squared_norms()).all()
    assert (found.squared_norms() > 0).all()
    assert_close(found.dense() * torch.exp2(powers)[:, None], form.dense(), 1e-12)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("some", [False, True])
def test_squares_under_a_kernel(bias: bool, groups: int, some: bool) -> None:
    form = convolved(groups)
    counted = draw(N, 9, seed=5) > 0 if some else None
    expected = map_products(form, bias, counted).diagonal(dim1=1, dim2=2)
    assert_close(map_squares(form, bias, counted), expected, 1e-12)
    if not some and groups == 1 and not bias:
        seen = F.unfold(form.right, 3).transpose(1, 2).flatten(0, 1)
        assert_close(map_squares(form, bias), seen.square().sum(0, keepdim=True), 1e-12)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_diagonal_of_a_factor(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factor_sums, "LARGEST_SIDE", 2)
    whole, diagonal = (FactorSum(groups, 3, draw(1), extra) for extra in (1, 0))
    for seed in range(3):
        columns = draw(groups, 3, 7, seed=seed) if groups > 1 else draw(3, 7, seed=seed)
        whole.add(columns)
        diagonal.add(columns)
    whole.reduce(4)
    diagonal.reduce(4)
    values, vectors = diagonal.eigenpairs()
    assert vectors is None
    assert_close(values, whole.total.diagonal(dim1=1, dim2=2), 1e-12)
    values, vectors = whole.eigenpairs()
    assert vectors is not None
    restored = vectors @ torch.diag_embed(values) @ vectors.transpose(1, 2)
    assert_close(restored, whole.total, 1e-12)


def test_what_is_a_bias() -> None:
    """The sum over positions of the output gradients, to rounding; nothing else."""
    weight = factored(3)
    sums = weight.deltas.sum(1)
    shape = torch.Size([6])
    assert is_bias_of(Dense(sums + 1e-15, shape), weight)
    assert not is_bias_of(Dense(sums + 1e-6 * draw(N, 6, seed=2), shape), weight)
    assert not is_bias_of(Dense(sums[:, :5], torch.Size([5])), weight)
    assert not is_bias_of(rows(), weight)
    assert not is_bias_of(Dense(sums, shape), rows())
    # sums that cancel are as near as their terms let them
    cancelling = torch.cat([weight.deltas, -weight.deltas], dim=1)
    null = Factored(cancelling, torch.cat([weight.inputs] * 2, dim=1), SHAPE)
    assert is_bias_of(Dense(1e-14 * draw(N, 6), shape), null)
    maps = convolved()
    assert is_bias_of(Dense(maps.left.flatten(2).sum(2), torch.Size([4])), maps)
    # what is not finite is refused elsewhere
    assert is_bias_of(Dense(sums * torch.nan, shape), weight)


def test_texts_of_one_rank() -> None:
    assert texts_of_ranks("é", torch.device("cpu")) == ["é"]


def test_layers_of_groups_and_tables_are_told_apart() -> None:
    """A tied pair of a grouped and a plain convolution has no one matrix."""
    observed = ObservedForms({"a": ["a.weight", "a.scale"], "b": ["b.weight"]})
    shapes = {"a.weight": torch.Size([4, 4, 3, 3]), "a.scale": torch.Size([1]), "b.weight": SHAPE}
    assert observed.without() == dict.fromkeys(shapes, NOT_USED)
    assert observed.without(used=True) == {}
    for form in (convolved(1), convolved(2)):
        observed.add(Gradients(N, {"a.weight": form}, shapes, draw(1)))
    assert observed.without()["a.weight"] == SEVERAL_KINDS
    assert observed.count == 3
    observed.add(Gradients(N, {"b.weight": rows()}, shapes, draw(1)))
    (piece,) = observed.pieces()["b"]
    assert piece.key == "b"
    assert piece.kind == ("table",)
