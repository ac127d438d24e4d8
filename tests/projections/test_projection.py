"""Projected gradients of every kind of layer against P_o^T G P_i written out."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import oracles
import pytest
import torch
from contract import assert_close
from gradients.test_layers import (
    LAYERS,
    Apply,
    LayerCase,
    NamedLikeGPT2Linear,
    floats,
    ids,
    squares,
)
from matrices import normal
from projected_oracles import LIKE, pieces, written_out
from torch import Tensor, nn

from influence_kit.gradients.forms import Dense, Sum
from influence_kit.gradients.gradient_source import GradientSource
from influence_kit.gradients.per_example import Gradients
from influence_kit.losses.loss import Loss
from influence_kit.projections.joint_projection import JointProjection, rows_of
from influence_kit.projections.maps import Identity, Placed
from influence_kit.projections.projection import Projection, columns_within, whole
from influence_kit.projections.random_maps import random_map
from influence_kit.projections.unit_maps import TwoSided, WrittenOut
from influence_kit.projections.units import Unit, units_of

pytestmark = pytest.mark.filterwarnings("ignore:.*no gradient rule fits.*")
N = 5
EXACT = 1e-12


def bias_used_elsewhere() -> nn.Module:
    return Apply(
        lambda m, x: m.b(torch.tanh(m.a(x))) * m.a.bias, a=nn.Linear(4, 3), b=nn.Linear(3, 3)
    )


class Square(NamedLikeGPT2Linear):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


def tied_transposed(first: str) -> nn.Module:
    """One weight of a linear layer and of GPT-2's, which stores it the other way round."""
    layers = {"linear": nn.Linear(3, 3), "transposed": Square()}
    one, two = layers.values() if first == "linear" else reversed(layers.values())
    two.weight = one.weight
    return Apply(lambda m, x: m.two(torch.tanh(m.one(x))), one=one, two=two)


def bias_before_weight() -> nn.Module:
    """As ``remove_weight_norm`` and ``prune.remove`` leave a layer."""
    layer = nn.Linear(4, 3)
    weight = layer.weight
    del layer.weight
    layer.weight = weight
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(3, 2))


def bare_parameters() -> nn.Module:
    return Apply(
        lambda m, x: ((m.a(x) @ m.matrix) * m.vector + m.number) @ m.table[1],
        a=nn.Linear(4, 3),
        matrix=nn.Parameter(torch.randn(3, 3)),
        vector=nn.Parameter(torch.randn(3)),
        number=nn.Parameter(torch.randn(())),
        table=nn.Parameter(torch.randn(2, 3, 4)),
    )


MORE = {
    "bias that is used elsewhere": LayerCase(bias_used_elsewhere, floats((N, 4))),
    "tied to a transposed linear": LayerCase(lambda: tied_transposed("linear"), floats((N, 3))),
    "transposed, tied to a linear": LayerCase(
        lambda: tied_transposed("transposed"), floats((N, 3))
    ),
    "bias before its weight": LayerCase(bias_before_weight, floats((N, 4))),
    "bare parameters": LayerCase(bare_parameters, floats((N, 4))),
    "table that is tied, with other uses": LayerCase(
        lambda: Apply(
            lambda m, x: m.table(x) @ m.table.weight.T + m.table(x).sum(-1, keepdim=True),
            table=nn.Embedding(6, 4),
        ),
        ids(N, 4),
    ),
}
CASES = {**LAYERS, **MORE}
NARROW = {name: case for name, case in CASES.items() if not name.endswith("wide")}
every_layer = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
every_narrow_layer = pytest.mark.parametrize("case", NARROW.values(), ids=NARROW.keys())


def prepared(case: LayerCase) -> tuple[nn.Module, list[str], Gradients, Tensor]:
    """The model, its chosen parameters, their gradients, and these by single-example autograd."""
    torch.manual_seed(0)
    model = case.build().double().eval()
    inputs = case.inputs()
    batch = (*inputs, torch.zeros(len(inputs[0])))
    chosen = {name: p for name, p in model.named_parameters() if p.requires_grad}
    expected = oracles.gradients(model, batch, squares, list(chosen))
    source = GradientSource(model, chosen)
    with source.attached():
        return model, list(chosen), source(batch, Loss(squares, "none", "loss_fn")), expected


def units(model: nn.Module, names: list[str]) -> list[Unit]:
    return units_of(model, {name: model.get_parameter(name) for name in names})


def projection(model: nn.Module, names: list[str], kind: str, then: bool) -> Projection:
    """Matrices to (2, 3) columns, vectors to 2; ``then`` to 4."""
    maps: dict[str, Any] = {}
    for unit in units(model, names):
        name = unit.names[0]
        if not unit.is_matrix:
            shape = model.get_parameter(name).shape
            maps[name] = WrittenOut({name: shape}, random_map(kind, shape.numel(), 2, name))
            continue
        left = random_map(kind, unit.outputs, min(2, unit.outputs), name, "o")
        right = random_map(kind, unit.inputs, min(3, unit.inputs), name, "i")
        last = random_map("sjlt", left.k * right.k, 4, name) if then else None
        maps[name] = TwoSided(unit, left, right, last)
    return Projection(maps)


# the last map takes what the two sides give, whatever they are
@every_layer
@pytest.mark.parametrize(("kind", "then"), [("gaussian", False), ("sjlt", True), ("mask", False)])
def test_every_layer(case: LayerCase, kind: str, then: bool) -> None:
    model, names, gradients, expected = prepared(case)
    project = projection(model, names, kind, then)
    found = project(gradients)
    columns = written_out(model, names, project.maps)
    assert {name: found.parameters[name].numel() for name in found.parameters} == {
        name: own.shape[1] for name, own in columns.items()
    }
    assert found.parameters == project.shapes
    assert all(isinstance(form, Dense) for form in found.forms.values())
    images = expected @ torch.cat(list(columns.values()), dim=1)
    if kind == "mask" and not images.any():  # of a large table: none of its rows was looked up
        assert not found.flat().any()
    else:
        assert_close(found.flat(), images, EXACT)


@every_narrow_layer
def test_every_layer_as_it_is(case: LayerCase) -> None:
    """The identity changes the order of entries alone: a matrix has its bias as a last column."""
    model, names, gradients, expected = prepared(case)
    maps: dict[str, Any] = {}
    for unit in units(model, names):
        shapes = {name: model.get_parameter(name).shape for name in unit.names}
        size = sum(shape.numel() for shape in shapes.values())
        maps[unit.names[0]] = whole(unit) if unit.is_matrix else WrittenOut(shapes, Identity(size))
    found = Projection(maps)(gradients)
    columns = written_out(model, names, maps)
    assert_close(found.flat(), expected @ torch.cat(list(columns.values()), dim=1), EXACT)
    assert_close(found.flat() @ found.flat().T, expected @ expected.T, EXACT)


@every_layer
def test_every_layer_in_a_small_workspace(case: LayerCase, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("form", "rows", "functional"):
        monkeypatch.setattr(f"influence_kit.gradients.{name}.workspace_bytes", lambda device: 300)
    model, names, gradients, expected = prepared(case)
    project = projection(model, names, "orthogonal", then=False)
    columns = written_out(model, names, project.maps)
    found = project(gradients).flat()
    assert_close(found, expected @ torch.cat(list(columns.values()), dim=1), EXACT)


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        pytest.param(case, kind, id=f"{name}-{kind}")
        for (name, case), kind in zip(
            NARROW.items(), itertools.cycle(["rademacher", "sjlt"]), strict=False
        )
    ],
)
def test_all_parameters_together(case: LayerCase, kind: str) -> None:
    model, names, gradients, expected = prepared(case)
    shapes = {name: model.get_parameter(name).shape for name in names}
    maps = {
        name: random_map(kind, shape.numel(), 6, name, rows=rows_of(shape))
        for name, shape in shapes.items()
    }
    project = JointProjection(maps, "all")
    assert project.k == 6
    stacked = torch.cat([maps[name].matrix(LIKE) for name in names])
    found = project(gradients)
    assert found.parameters == {"all": torch.Size([6])}
    assert_close(found.flat(), expected @ stacked, EXACT)
    parts = project.of_parameters(gradients)
    assert parts.parameters == dict.fromkeys(names, torch.Size([6]))
    summed = parts.flat().view(len(expected), len(names), 6).sum(1)
    assert_close(summed, expected @ stacked, EXACT)
    sizes = [model.get_parameter(name).numel() for name in names]
    for name, own in zip(names, expected.split(sizes, dim=1), strict=True):
        if name in parts.forms:
            product = own @ maps[name].matrix(LIKE)
            assert torch.allclose(parts.forms[name].dense(), product, rtol=1e-11, atol=1e-11)


def test_all_parameters_side_by_side() -> None:
    model, names, gradients, expected = prepared(CASES["tied linear layers"])
    total = expected.shape[1]
    starts = itertools.accumulate([0, *(model.get_parameter(n).numel() for n in names)])
    maps = {
        name: Placed(model.get_parameter(name).numel(), total, start)
        for name, start in zip(names, starts, strict=False)
    }
    assert_close(JointProjection(maps, "all")(gradients).flat(), expected, EXACT)


# Which parameters go together.


@every_layer
def test_units(case: LayerCase) -> None:
    """Every chosen parameter is in one unit, a layer's weight and bias in the same."""
    torch.manual_seed(0)
    model = case.build()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    found = units(model, names)
    assert sorted(name for unit in found for name in unit.names) == sorted(names)
    expected = pieces(model, names)
    assert [list(unit.names) for unit in found] == [piece.names for piece in expected]
    for unit, piece in zip(found, expected, strict=True):
        assert unit.is_matrix == piece.is_matrix
        assert unit.transposed == piece.transposed
        assert unit.bias == (piece.names[1] if len(piece.names) > 1 else None)
        assert not piece.is_matrix or (unit.outputs, unit.inputs) == piece.sizes


def test_units_of_some_parameters() -> None:
    """A frozen weight leaves its bias alone, and a frozen bias its weight."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Conv1d(2, 3, 5))
    chosen = {"0.bias": model[0].bias, "1.weight": model[1].weight}
    assert units_of(model, chosen) == [Unit(("0.bias",), 0, 0), Unit(("1.weight",), 3, 10)]
    one = nn.Linear(4, 3)
    assert units_of(one, dict(one.named_parameters())) == [Unit(("weight", "bias"), 3, 5)]


def test_a_bias_without_a_gradient_and_a_weight_without_one() -> None:
    unit = Unit(("w", "b"), 2, 4)
    left, right = random_map("gaussian", 2, 2, 0), random_map("gaussian", 4, 3, 1)
    shapes = {"w": torch.Size([2, 3]), "b": torch.Size([2])}
    w, b = Dense(normal(5, 6), shapes["w"]), Dense(normal(5, 2, seed=1), shapes["b"])
    p_o, p_i = left.matrix(LIKE), right.matrix(LIKE)
    project = TwoSided(unit, left, right)
    assert project.k == 6
    from_weight = torch.einsum("oa,noi,ib->nab", p_o, w.values.view(5, 2, 3), p_i[:3]).flatten(1)
    from_bias = torch.einsum("oa,no,b->nab", p_o, b.values, p_i[3]).flatten(1)
    for forms, expected in (
        ({"w": w}, from_weight),
        ({"b": b}, from_bias),
        ({"w": w, "b": b}, from_weight + from_bias),
        ({"w": Sum((w, w)), "b": b}, 2 * from_weight + from_bias),
    ):
        assert_close(project(Gradients(5, forms, shapes, w.values)), expected, EXACT)
        assert torch.equal(w.values, normal(5, 6)), "the gradients came back changed"
    nothing = Gradients(5, {}, shapes, w.values)
    assert project(nothing) is None
    found = Projection({"w": project})(nothing)
    assert found.forms == {}
    assert torch.equal(found.flat(), torch.zeros(5, 6, dtype=torch.float64))


def test_parameters_that_are_written_side_by_side() -> None:
    shapes = {"a": torch.Size([2, 3]), "b": torch.Size([4])}
    a, b = Dense(normal(5, 6), shapes["a"]), Dense(normal(5, 4, seed=1), shapes["b"])
    project = WrittenOut(shapes, random_map("sjlt", 10, 3, 0))
    matrix = project.map.matrix(LIKE)
    other = Dense(normal(5, 9), torch.Size([9]))
    everything = {**shapes, "c": torch.Size([9])}
    for forms, expected in (
        ({"a": a, "b": b, "c": other}, torch.cat([a.values, b.values], dim=1) @ matrix),
        ({"c": other, "b": b}, b.values @ matrix[6:]),
        ({"a": a}, a.values @ matrix[:6]),
    ):
        assert_close(project(Gradients(5, forms, everything, a.values)), expected, EXACT)
    assert project(Gradients(5, {"c": other}, everything, a.values)) is None


# How many columns.


def sizes() -> Iterator[tuple[int, int, int]]:
    return itertools.product(range(1, 41), range(1, 13), range(1, 13))


def test_columns_of_the_most_products() -> None:
    """Never more than asked for; the root for each side, or what a shorter side leaves."""
    for dim, outputs, inputs in sizes():
        left, right = columns_within(dim, outputs, inputs)
        if outputs * inputs <= dim:
            assert (left, right) == (outputs, inputs)
            continue
        root = math.isqrt(dim)
        assert 1 <= left <= outputs
        assert 1 <= right <= inputs
        assert left * right <= dim
        assert left >= min(outputs, root)
        assert right >= min(inputs, root)
        # a shorter side is whole, and then the other cannot be longer
        if outputs <= root:
            assert left == outputs
            assert right == inputs or left * (right + 1) > dim
        elif inputs <= root:
            assert right == inputs
            assert left == outputs or (left + 1) * right > dim


def test_columns_of_a_pair() -> None:
    for left, right in itertools.product(range(1, 6), repeat=2):
        for outputs, inputs in itertools.product(range(1, 6), repeat=2):
            expected = (min(left, outputs), min(right, inputs))
            assert columns_within((left, right), outputs, inputs) == expected
