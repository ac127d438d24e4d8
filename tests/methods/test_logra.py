"""LoGra against its formula written out, given the same random matrices.

What LoGra, GraSS and FactGraSS share is tested here, of all three. Dampings are at most the median
eigenvalue of F, so that F has its say.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import influence_oracles as dense
import oracles
import projected_oracles as projected
import pytest
import slope_oracle
import torch
from cases import CASES, Examples, TanhMLP, cross_entropy
from contract import assert_close
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from turns import in_turn

import influence_kit
from influence_kit import ExplicitInfluenceFunction, FactGraSS, GraSS, LoGra
from influence_kit.errors import CurvatureError, InvalidArgumentError
from influence_kit.projections.maps import Identity

CLOSE = 1e-8
NAMES = ["mlp", "cnn", "gpt"]
# what projects something of every model, and of the three methods the most telling; "LoGra, long"
# has more than twice as many entries in some layers as there are examples
SETTINGS: dict[str, tuple[type, dict[str, Any]]] = {
    "LoGra": (LoGra, {"projection_dim": (2, 3)}),
    "LoGra, in all": (LoGra, {"projection_dim": 7, "projection": "rademacher"}),
    "LoGra, long": (LoGra, {"projection_dim": 28, "projection": "gaussian"}),
    "GraSS": (GraSS, {"projection_dim": 5, "blow_up": 2}),
    "GraSS, learnt": (GraSS, {"projection_dim": 4, "mask": "learnt"}),
    "FactGraSS": (FactGraSS, {"projection_dim": 5, "blow_up": 2}),
}
every_case = pytest.mark.parametrize("name", NAMES)
every_method = pytest.mark.parametrize("method", SETTINGS)


def make(method: str, name: str, **changed: Any) -> Any:
    """A method on a case's first checkpoint; ``changed`` replaces any argument."""
    cls, own = SETTINGS[method]
    case = CASES[name]
    model = changed.pop("model", None) or case.model()
    data = changed.pop("data", None) or Examples(case.train)
    checkpoints = changed.pop("checkpoints", None) or case.states[:1]
    return cls(model, data, checkpoints, **{"loss_fn": case.loss, "batch_size": 4} | own | changed)


# The formula.


@cache
def model_at(name: str, place: int = 0) -> nn.Module:
    model = CASES[name].model()
    model.load_state_dict(CASES[name].states[place])
    return model


def gradients(name: str, batch: Any, place: int = 0) -> Tensor:
    """``[n, P]``, P the parameters that are trained."""
    return oracles.gradients(model_at(name, place), batch, CASES[name].loss)


class Formula:
    """Everything of a method's scores at one checkpoint, given its random matrices."""

    def __init__(
        self, influence: Any, name: str, place: int = 0, fitted_on: Tensor | None = None
    ) -> None:
        case = CASES[name]
        names = [n for n, _ in model_at(name).named_parameters()]
        self.columns = projected.written_out(model_at(name), names, influence._map.maps.maps)
        matrix = torch.cat(list(self.columns.values()), dim=1)
        self.h = gradients(name, case.test, place) @ matrix
        self.g = gradients(name, case.train, place) @ matrix
        self.f = self.g if fitted_on is None else fitted_on @ matrix

    def inverse(self, damping: Any, blocks: Any = "layer") -> Tensor:
        groups, fisher = self._fisher(blocks)
        return projected.inverse_of(fisher, groups, damping)

    def scores(self, damping: Any, blocks: Any = "layer", relative: str | None = None) -> Tensor:
        return dense.scores(self.inverse(damping, blocks), self.h, self.g, relative)

    def median(self, blocks: Any = "layer") -> dict[str, float]:
        """The median eigenvalue of F in each block."""
        groups, fisher = self._fisher(blocks)
        return {b: dense.median_eigenvalue(fisher[i[:, None], i]) for b, i in groups.items()}

    def automatic(self, blocks: Any = "layer") -> dict[str, float]:
        """The damping of each block that "auto" stands for."""
        groups, fisher = self._fisher(blocks)
        n = len(self.f)
        return {b: projected.automatic(fisher, i, n) for b, i in groups.items()}

    def _fisher(self, blocks: Any) -> tuple[dict[str, Tensor], Tensor]:
        groups = projected.groups_of(self.columns, blocks)
        return groups, projected.curvature(self.f, list(groups.values()))


def fitted(method: str, name: str, **changed: Any) -> Any:
    """The same after ``fit``, when a learnt mask is known."""
    return make(method, name, **changed).fit()


@every_method
@every_case
@pytest.mark.parametrize("share", [1.0, 1e-2])
def test_scores_are_the_formula(method: str, name: str, share: float) -> None:
    influence = fitted(method, name)
    formula = Formula(influence, name)
    median = formula.median()
    for damping in (
        {block: share * value for block, value in median.items()},
        share * min(median.values()),
    ):
        influence.damping = damping
        expected = formula.scores(damping)
        assert_close(influence.influence(CASES[name].test), expected, CLOSE)
        # the damping must not hide F: a plain dot product is something else
        dots = formula.h @ formula.g.T
        cosine = torch.nn.functional.cosine_similarity(expected.flatten(), dots.flatten(), dim=0)
        assert cosine < 0.97


@every_method
@every_case
@pytest.mark.parametrize("blocks", ["layer", "full"])
def test_automatic_damping(method: str, name: str, blocks: str) -> None:
    influence = fitted(method, name, blocks=blocks)
    formula = Formula(influence, name)
    expected = formula.automatic(blocks)
    scores = formula.scores(expected, blocks)
    assert_close(influence.influence(CASES[name].test), scores, CLOSE)
    (used,) = influence.damping_used
    assert used.keys() == expected.keys()
    assert list(used.values()) == pytest.approx(list(expected.values()), rel=1e-9)


@in_turn(
    "method, name, relative, blocks",
    SETTINGS,
    ["mlp", "gpt"],
    [None, "l", "theta"],
    ["layer", "full", "some"],
)
def test_blocks_and_relative_influence(
    method: str, name: str, relative: str | None, blocks: Any
) -> None:
    if blocks == "some":  # what no block has is frozen
        blocks = {
            "mlp": {"a": ["head.weight", "body.0.weight"]},
            "gpt": {"a": ["out.weight"], "b": ["tokens.weight", "norm.bias"]},
        }[name]
    influence = fitted(method, name, blocks=blocks, relative=relative)
    formula = Formula(influence, name)
    damping = formula.median(blocks)
    influence.damping = damping
    expected = formula.scores(damping, blocks, relative)
    assert_close(influence.influence(CASES[name].test), expected, CLOSE)
    assert influence.block_names == list(damping)


@every_method
@every_case
def test_several_checkpoints_are_averaged(method: str, name: str) -> None:
    """One projection for all of them, and a mask learnt at the first."""
    case = CASES[name]
    influence = fitted(method, name, checkpoints=case.checkpoints())
    formulas = [Formula(influence, name, place) for place in range(3)]
    expected = [formula.scores(formula.automatic()) for formula in formulas]
    assert_close(influence.influence(case.test), torch.stack(expected).mean(0), CLOSE)


@every_method
@every_case
def test_other_data_for_the_curvature(method: str, name: str) -> None:
    torch.manual_seed(77)
    other = CASES[name].batch(9)
    influence = fitted(method, name, hessian_dataset=Examples(other))
    formula = Formula(influence, name, fitted_on=gradients(name, other))
    expected = formula.scores(formula.automatic())
    assert_close(influence.influence(CASES[name].test), expected, CLOSE)


@every_method
@every_case
def test_the_fisher_of_sampled_slopes(method: str, name: str) -> None:
    """F of gradients at the slopes that are sampled, scores of those at the labels of the data."""
    case, model = CASES[name], model_at(name)
    influence = fitted(method, name, curvature="fisher", seed=3)
    slopes = slope_oracle.with_slopes(model, case.train, 3)
    rows = oracles.gradients(model, slopes, slope_oracle.products)
    formula = Formula(influence, name, fitted_on=rows)
    assert_close(influence.influence(case.test), formula.scores(formula.automatic()), CLOSE)


@every_method
@every_case
def test_scores_by_layer(method: str, name: str) -> None:
    influence = fitted(method, name)
    formula = Formula(influence, name)
    damping = formula.median()
    influence.damping = damping
    found = influence.influence_by_layer(CASES[name].test)
    groups = projected.groups_of(formula.columns, "layer")
    assert found.keys() == groups.keys()
    whole = formula.scores(damping)
    for layer, group in groups.items():
        fisher = projected.curvature(formula.f, [group])
        inverse = projected.inverse_of(fisher, {layer: group}, damping)
        expected = formula.h @ inverse @ formula.g.T
        assert (found[layer] - expected).abs().max() <= CLOSE * whole.abs().max()


@every_method
@every_case
def test_quantities_are_the_projected_test_side(method: str, name: str) -> None:
    influence = fitted(method, name)
    formula = Formula(influence, name)
    expected = formula.h @ formula.inverse(formula.automatic())
    found = influence.compute_intermediate_quantities(CASES[name].test)
    assert_close(found, expected, CLOSE)


@in_turn("of_test, method, name", [True, False], SETTINGS, NAMES)
def test_self_influence(method: str, name: str, of_test: bool) -> None:
    influence = fitted(method, name)
    formula = Formula(influence, name)
    if of_test:
        formula.f, formula.g = formula.g, formula.h
    else:
        formula.h = formula.g
    damping = Formula(influence, name).automatic()
    expected = formula.scores(damping).diagonal()
    found = influence.self_influence(CASES[name].test if of_test else None)
    assert_close(found, expected, CLOSE)


# The gradient of scores in the training inputs.


def scores_of(name: str, train: Any, inverse: Tensor, formula: Formula) -> Tensor:
    matrix = torch.cat(list(formula.columns.values()), dim=1)
    return formula.h @ inverse @ (gradients(name, train) @ matrix).T


@every_method
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_perturbation_influence_is_the_slope_of_the_scores(method: str, name: str) -> None:
    """Central differences of the formula, the inverse held fixed."""
    case = CASES[name]
    influence = fitted(method, name)
    formula = Formula(influence, name)
    inverse = formula.inverse(formula.automatic())
    found = influence.perturbation_influence(case.test)
    x, y = case.train
    assert found.shape == (case.m, *x.shape)
    flat = found.flatten(2)
    for place in range(0, x[0].numel(), 5):
        step = torch.zeros_like(x[0]).flatten()
        step[place] = 1e-5
        up, down = (x + sign * step.view_as(x[0]) for sign in (1, -1))
        slope = scores_of(name, (up, y), inverse, formula)
        slope = (slope - scores_of(name, (down, y), inverse, formula)) / 2e-5
        assert (flat[:, :, place] - slope).abs().max() <= 1e-6 * flat.abs().max()
    quantities = influence.compute_intermediate_quantities(case.test)
    assert_close(influence.perturbation_influence(quantities), found, CLOSE)


def test_perturbation_influence_of_some_blocks() -> None:
    blocks = {"a": ["head.weight"]}
    influence = make("LoGra", "mlp", blocks=blocks, projection="identity", damping=0.1)
    exact = ExplicitInfluenceFunction(
        CASES["mlp"].model(),
        Examples(CASES["mlp"].train),
        CASES["mlp"].states[:1],
        loss_fn=cross_entropy,
        damping=0.1,
        curvature="empirical_fisher",
        blocks={"a": ["head.weight", "head.bias"]},
        layers=["head"],
    )
    # all parameters of a partial cover are there, the rest with a vector of zero
    test = CASES["mlp"].test
    found = influence.perturbation_influence(test)
    assert_close(found, exact.perturbation_influence(test), CLOSE)


@every_method
def test_perturbation_influence_is_not_relative(method: str) -> None:
    influence = make(method, "mlp", relative="l")
    with pytest.raises(NotImplementedError, match='with relative="l" scores are divided by a norm'):
        influence.perturbation_influence(CASES["mlp"].test)


# The projections of LoGra.


@in_turn(
    "projection, dim, name",
    ["gaussian", "rademacher", "orthogonal"],
    [1, 6, 20, (1, 2), (2, 3), (50, 2), (50, 50)],
    NAMES,
)
def test_every_projection(projection: str, dim: Any, name: str) -> None:
    # the classes' gradients sum to zero, and so would a head's image under three equal signs
    influence = fitted("LoGra", name, projection=projection, projection_dim=dim, seed=2)
    formula = Formula(influence, name)
    damping = formula.median()
    influence.damping = damping
    assert_close(influence.influence(CASES[name].test), formula.scores(damping), CLOSE)


@every_case
@pytest.mark.parametrize("relative", [None, "l", "theta"])
def test_the_identity_is_the_exact_influence_function(name: str, relative: str | None) -> None:
    case = CASES[name]
    exact = ExplicitInfluenceFunction(
        case.model(),
        Examples(case.train),
        case.checkpoints(),
        loss_fn=case.loss,
        curvature="empirical_fisher",
        blocks="layer",
        relative=relative,
    )
    own = {"checkpoints": case.checkpoints(), "relative": relative}
    influence = make("LoGra", name, projection="identity", **own)
    influence.fit()
    for damping in (influence.damping_used[0], 1e-3):
        exact.damping = influence.damping = damping
        expected = exact.influence(case.test)
        assert_close(influence.influence(case.test), expected, CLOSE)
    # and so is what projects nothing since there is nothing to gain
    whole = make("LoGra", name, projection_dim=10**6, damping=1e-3, **own)
    assert_close(whole.influence(case.test), expected, CLOSE)


@every_case
@pytest.mark.parametrize("dim", [(1, 99), (99, 2), (99, 99), 6, 20])
def test_a_side_that_is_short_stays_as_it_is(name: str, dim: Any) -> None:
    """A square random matrix would shorten nothing and disturb what it multiplies."""
    influence = make("LoGra", name, projection="gaussian", projection_dim=dim)
    for unit in influence._map.maps.maps.values():
        for side in (unit.left, unit.right) if hasattr(unit, "left") else (unit.map,):
            assert isinstance(side, Identity) == (side.k == side.p)
            assert side.k <= side.p


def test_how_many_entries_a_layer_gets() -> None:
    """Of a pair the columns of each side, where there are as many; of a number at most that."""

    def sizes(dim: Any, projection: str = "gaussian") -> dict[str, int]:
        influence = make("LoGra", "gpt", projection_dim=dim, projection=projection)
        return {name: shape.numel() for name, shape in influence._map.shapes.items()}

    table, norm = ["tokens.weight", "positions.weight"], ["norm.weight", "norm.bias"]
    names = [*table, *norm, "qkv.weight", "out.weight"]
    # tables of 7 x 4 and 5 x 4, matrices of 12 x 5 and 4 x 5, vectors of 4
    assert sizes((2, 3)) == dict(zip(names, [6, 6, 4, 4, 6, 6], strict=True))
    assert sizes((9, 1)) == dict(zip(names, [7, 5, 4, 4, 9, 4], strict=True))
    assert sizes((1, 2)) == dict(zip(names, [2, 2, 2, 2, 2, 2], strict=True))
    assert sizes(20) == dict(zip(names, [20, 20, 4, 4, 16, 20], strict=True))
    assert sizes(30) == dict(zip(names, [28, 20, 4, 4, 30, 20], strict=True))
    assert sizes(3) == dict(zip(names, [1, 1, 3, 3, 1, 1], strict=True))
    assert sizes(3, "identity") == dict(zip(names, [28, 20, 4, 4, 60, 20], strict=True))


@every_method
def test_a_seed_is_a_projection(method: str) -> None:
    test = CASES["mlp"].test
    first = make(method, "mlp").influence(test)
    assert torch.equal(make(method, "mlp", seed=0).influence(test), first)
    assert not torch.allclose(make(method, "mlp", seed=1).influence(test), first)


# a learnt mask depends on the gradients
@pytest.mark.parametrize("method", [name for name in SETTINGS if name != "GraSS, learnt"])
def test_a_layers_projection_depends_on_its_name_alone(method: str) -> None:
    """Not on which other layers there are."""
    one = make(method, "mlp", layers=["head"])
    every = make(method, "mlp")
    (found,) = one._map.maps.maps.values()
    (expected,) = [unit for name, unit in every._map.maps.maps.items() if name == "head.weight"]
    piece = projected.pieces(model_at("mlp"), ["head.weight", "head.bias"])[0]
    both = [projected.own_matrix(piece, unit) for unit in (found, expected)]
    assert torch.equal(*both)


@pytest.mark.parametrize("method", ["LoGra", "GraSS", "FactGraSS"])
def test_inner_products_are_kept_on_average(method: str) -> None:
    """E<u', u> = <g', g>."""
    seeds = 150
    h, g = gradients("mlp", CASES["mlp"].test), gradients("mlp", CASES["mlp"].train)
    names = [n for n, _ in model_at("mlp").named_parameters()]
    found = []
    for seed in range(seeds):
        influence = make(method, "mlp", seed=seed)
        columns = projected.written_out(model_at("mlp"), names, influence._map.maps.maps)
        matrix = torch.cat(list(columns.values()), dim=1)
        found.append((h @ matrix) @ (g @ matrix).T)
    products = torch.stack(found)
    error = products.std(0) / seeds**0.5
    # 44 means: five standard errors have a chance of 3e-5 in all
    assert ((products.mean(0) - h @ g.T).abs() / error).max() < 5


# What is computed once.


@contextmanager
def counted(model: nn.Module) -> Iterator[list[int]]:
    """The number of examples of each pass through the model."""
    passes: list[int] = []
    handle = model.register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    try:
        yield passes
    finally:
        handle.remove()


@every_method
@pytest.mark.parametrize("place", ["memory", "store"])
def test_training_gradients_are_computed_once(method: str, place: str, tmp_path: Path) -> None:
    case = CASES["mlp"]
    model = case.model()
    own: dict[str, Any] = {"store": tmp_path / "store"} if place == "store" else {}
    own["verify"] = "once"
    influence = make(method, "mlp", model=model, checkpoints=case.checkpoints(), **own)
    influence.influence(case.test)
    with counted(model) as passes:
        first = influence.influence(case.test)
        # examples that show that the model is the same, one to see what it takes, then the test
        # examples at each checkpoint
        assert passes == [4, 4, 1, *[case.m] * 3]
        influence.damping = 1e-4
        second = influence.influence(case.test, k=2)
        influence.damping = dict.fromkeys(influence.block_names, 1e-3)
        third = influence.influence(case.test)
        assert passes == [4, 4, 1, *[case.m] * 3] * 3
        passes.clear()
        influence.self_influence()
        assert passes == [4, 4]
    for damping, found in ((1e-4, second.influence_scores), (1e-3, third)):
        anew = make(method, "mlp", checkpoints=case.checkpoints(), damping=damping)
        expected = anew.influence(case.test)
        expected = expected.topk(2).values if damping == 1e-4 else expected
        assert_close(found, expected, CLOSE)
    assert not torch.allclose(first, third)


@every_method
@pytest.mark.parametrize(("name", "relative"), [("mlp", "l"), ("gpt", None)])
def test_kept_in_memory_or_not(
    method: str, name: str, relative: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    own = {"checkpoints": case.checkpoints()[:2], "relative": relative}
    kept = make(method, name, **own)
    expected = kept.influence(case.test), kept.self_influence(), kept.influence(case.test, k=3)
    assert kept._cache.rows is not None
    monkeypatch.setattr("influence_kit.methods.gradient_cache.resident_bytes", lambda device: 0)
    anew = make(method, name, **own)
    assert_close(anew.influence(case.test), expected[0], 1e-10)
    assert anew._cache.rows is None
    assert_close(anew.self_influence(), expected[1], 1e-10)
    assert torch.equal(anew.influence(case.test, k=3).indices, expected[2].indices)
    by_layer = torch.stack(list(anew.influence_by_layer(case.test).values()))
    assert_close(torch.stack(list(kept.influence_by_layer(case.test).values())), by_layer, 1e-10)


@every_method
def test_what_does_not_fit_is_computed_at_every_question(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("influence_kit.methods.gradient_cache.resident_bytes", lambda device: 0)
    case = CASES["mlp"]
    model = case.model()
    influence = make(method, "mlp", model=model, verify="once").fit()
    with counted(model) as passes:
        influence.influence(case.test)
    assert passes == [4, 4, 1, case.m, 4, 4, 3], "the model, what it takes, then all"


@every_method
def test_checkpoints_that_are_set_anew_are_projected_anew(method: str) -> None:
    case = CASES["mlp"]
    influence = make(method, "mlp")
    influence.influence(case.test)
    influence.checkpoints = case.states[1:2]
    expected = make(method, "mlp", checkpoints=case.states[1:2]).influence(case.test)
    assert_close(influence.influence(case.test), expected, 1e-10)


# On disk.


@in_turn("name, method", NAMES, SETTINGS)
def test_saved_and_loaded(method: str, name: str, tmp_path: Path) -> None:
    case = CASES[name]
    influence = make(method, name, checkpoints=case.checkpoints()[:2])
    expected = influence.influence(case.test)
    influence.save(tmp_path)
    loaded = make(method, name, checkpoints=case.checkpoints()[:2]).load(tmp_path)
    assert_close(loaded.influence(case.test), expected, 1e-12)
    for place, formula in ((p, Formula(loaded, name, p)) for p in range(2)):
        assert torch.equal(formula.g, Formula(influence, name, place).g)


@pytest.mark.parametrize(
    ("method", "changed", "match"),
    [
        ("LoGra", {"projection": "gaussian"}, "projection: .*gaussian"),
        ("LoGra", {"projection_dim": (2, 2)}, r"projection_dim: \[2, 3\] there, \[2, 2\] here"),
        ("LoGra", {"projection_dim": 6}, r"projection_dim: \[2, 3\] there, 6 here"),
        ("LoGra", {"seed": 1}, "seed: 0 there, 1 here"),
        ("LoGra", {"curvature": "fisher"}, 'curvature: "empirical_fisher" there, "fisher" here'),
        ("LoGra", {"blocks": "full"}, "blocks: "),
        ("LoGra", {"layers": ["head"]}, "blocks: "),
        ("GraSS", {"blow_up": 3}, "blow_up: 2 there, 3 here"),
        ("GraSS", {"mask": "learnt"}, 'mask: "random" there, "learnt" here'),
        ("GraSS, learnt", {"projection_dim": 5}, "projection_dim: 4 there, 5 here"),
        ("FactGraSS", {"projection_dim": 6}, "projection_dim: 5 there, 6 here"),
    ],
)
def test_what_was_saved_with_other_settings_is_refused(
    method: str, changed: Mapping[str, Any], match: str, tmp_path: Path
) -> None:
    make(method, "mlp").save(tmp_path)
    with pytest.raises(InvalidArgumentError, match=f"was saved for something else: .*{match}"):
        make(method, "mlp", **changed).load(tmp_path)


def test_what_another_method_has_saved_is_refused(tmp_path: Path) -> None:
    make("GraSS", "mlp").save(tmp_path)
    with pytest.raises(InvalidArgumentError, match='method: "GraSS" there, "FactGraSS" here'):
        make("FactGraSS", "mlp").load(tmp_path)


# Mistakes.


@pytest.mark.parametrize("value", ["sjlt", "mask", "normal", None, 3])
def test_a_projection_that_there_is_not(value: Any) -> None:
    match = f"`projection` must be one of gaussian, rademacher, orthogonal, identity; got {value!r}"
    with pytest.raises(InvalidArgumentError, match=match):
        make("LoGra", "mlp", projection=value)


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "8", None, (2,), (2, 3, 4), (2, 0), (2, True)])
def test_a_projection_dim_that_cannot_be_meant(value: Any) -> None:
    match = r"`projection_dim` must be a positive int, or a pair of them .*; got "
    with pytest.raises(InvalidArgumentError, match=match) as found:
        make("LoGra", "mlp", projection_dim=value)
    assert str(found.value).endswith(f"got {value!r}")


@every_method
@pytest.mark.parametrize("value", ["ggn", "hessian", None])
def test_a_curvature_that_projected_gradients_do_not_have(method: str, value: Any) -> None:
    match = (
        f'`curvature` must be "fisher" or "empirical_fisher" for projected gradients; got {value!r}'
    )
    with pytest.raises(InvalidArgumentError, match=match):
        make(method, "mlp", curvature=value)


@every_method
def test_blocks_of_what_is_not_projected_by_itself(method: str) -> None:
    match = r"block 'a' must be a list of names of chosen parameters; got \['head.bias'\]"
    with pytest.raises(InvalidArgumentError, match=match):
        make(method, "mlp", blocks={"a": ["head.bias"]})


@every_method
def test_a_singular_curvature_without_damping(method: str) -> None:
    influence = make(method, "mlp", damping=0.0, blocks="full")
    with pytest.raises(CurvatureError, match="the curvature of block 'full' is singular"):
        influence.influence(CASES["mlp"].test)


@every_method
def test_a_damping_for_each_block(method: str) -> None:
    with pytest.raises(InvalidArgumentError, match=r"`damping` names the blocks \['0'\]; there"):
        make(method, "mlp", damping={"0": 1.0})


@every_method
def test_a_layer_whose_gradients_are_zero(method: str) -> None:
    class Unused(TanhMLP):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 0 * self.spare(x)

    torch.manual_seed(0)
    model = Unused().double()
    influence = make(method, "mlp", model=model, checkpoints=[model.state_dict()])
    match = "damping=\"auto\" is a share of .* which is 0 in block 'spare'"
    with pytest.raises(InvalidArgumentError, match=match):
        influence.influence(CASES["mlp"].test)


def test_names_that_the_package_shows() -> None:
    for cls in (LoGra, GraSS, FactGraSS):
        assert cls.__name__ in influence_kit.__all__
        assert cls.__doc__ is not None
        assert cls.__doc__.startswith("score = sum over layers of u_test^T (F + damping I)^-1")


@every_method
def test_a_model_with_few_examples(method: str) -> None:
    """Fewer than a mask is learnt from, and fewer than there are entries."""
    x, y = CASES["mlp"].train
    data = TensorDataset(x[:3], y[:3])
    found = make(method, "mlp", data=data).influence(CASES["mlp"].test)
    assert found.shape == (4, 3)
    assert bool(torch.isfinite(found).all())
