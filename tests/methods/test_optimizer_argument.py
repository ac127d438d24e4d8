"""``optimizer="adam"``: Adam's directions of training examples, against steps of torch's Adam."""

import copy
from collections.abc import Sequence
from typing import Any

import influence_oracles as dense
import oracles
import projected_oracles as projected
import pytest
import torch
from cases import SHORT, Case, Examples
from contract import assert_close, with_adam
from torch import Tensor

from influence_kit import (
    LESS,
    ExplicitInfluenceFunction,
    GradCos,
    GradDot,
    InfluenceFunction,
    LoGra,
    TracInCP,
)
from influence_kit.curvature import Explicit
from influence_kit.errors import ChangedError, InvalidArgumentError
from influence_kit.gradients import FeatureMap
from influence_kit.projections import Projected

NAMES = ["mlp", "cnn", "gpt"]
every_case = pytest.mark.parametrize("name", NAMES)


def make(cls: Any, case: Case, **changed: Any) -> Any:
    given = {"loss_fn": case.loss, "batch_size": 4, "optimizer": "adam"} | changed
    model, checkpoints = given.pop("model", None), given.pop("checkpoints", None)
    data = Examples(given.pop("train", case.train))
    return cls(model or case.model(), data, checkpoints or with_adam(case), **given)


def sides(case: Case) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Test gradients, training gradients, and directions ``[n, P]``, at each checkpoint."""
    model, found = case.model(), []
    for checkpoint in with_adam(case):
        model.load_state_dict(checkpoint["state_dict"])
        h, g = (oracles.gradients(model, batch, case.loss) for batch in (case.test, case.train))
        found.append((h, g, oracles.adam_directions(model, checkpoint, g)))
    return found


def unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True)


@every_case
def test_inner_products(name: str) -> None:
    case = SHORT[name]
    found = sides(case)
    rates = [checkpoint["learning_rate"] for checkpoint in with_adam(case)]
    dots = [h @ d.T for h, _, d in found]
    expected = {
        GradDot: sum(dots),
        GradCos: sum(unit(h) @ unit(d).T for h, _, d in found),
        TracInCP: sum(rate * one for rate, one in zip(rates, dots, strict=True)),
    }
    for cls, scores in expected.items():
        assert_close(make(cls, case).influence(case.test), scores)
        plain = make(cls, case, optimizer=None).influence(case.test)
        assert not torch.allclose(plain, scores, rtol=1e-2)


@every_case
def test_less_with_dots_is_tracin(name: str) -> None:
    case = SHORT[name]
    less = LESS(
        case.model(), Examples(case.train), with_adam(case), loss_fn=case.loss, similarity="dot"
    )
    assert_close(make(TracInCP, case).influence(case.test), less.influence(case.test))


@every_case
def test_an_example_with_itself_is_its_gradient_with_its_direction(name: str) -> None:
    case = SHORT[name]
    found = sides(case)
    dots = sum((g * d).sum(1) for _, g, d in found)
    cosines = sum((unit(g) * unit(d)).sum(1) for _, g, d in found)
    assert_close(make(GradDot, case).self_influence(), dots)
    assert_close(make(GradCos, case).self_influence(), cosines)
    whole = Projected(projection="identity")
    assert_close(make(GradDot, case, features=whole).self_influence(), dots)
    with pytest.raises(NotImplementedError, match="treats test and training examples differently"):
        make(GradDot, case).compute_intermediate_quantities(case.test)


class Formula:
    """LoGra's scores over checkpoints: F of gradients, directions of training examples."""

    def __init__(self, made: LoGra, case: Case) -> None:
        names = [n for n, _ in case.model().named_parameters()]
        columns = projected.written_out(case.model(), names, made._map.maps.maps)
        matrix = torch.cat(list(columns.values()), dim=1)
        self.groups = projected.groups_of(columns, "layer")
        self.sides = [tuple(side @ matrix for side in at) for at in sides(case)]

    def inverses(self, damping: Sequence[Any]) -> list[Tensor]:
        groups = list(self.groups.values())
        return [
            projected.inverse_of(projected.curvature(g, groups), self.groups, value)
            for (_, g, _), value in zip(self.sides, damping, strict=True)
        ]

    def scores(self, damping: Sequence[Any], relative: str | None = None) -> Tensor:
        pairs = zip(self.sides, self.inverses(damping), strict=True)
        found = [dense.scores(inverse, h, d, relative) for (h, _, d), inverse in pairs]
        return torch.stack(found).mean(0)


@every_case
@pytest.mark.parametrize("relative", [None, "l", "theta"])
def test_logra(name: str, relative: str | None) -> None:
    case = SHORT[name]
    made = make(LoGra, case, projection_dim=(2, 3), relative=relative)
    found, formula = made.influence(case.test), Formula(made, case)
    assert_close(found, formula.scores(made.damping_used, relative), 1e-8)
    # not cached, and with F of the same examples given
    given = make(
        LoGra, case, projection_dim=(2, 3), relative=relative, hessian_dataset=Examples(case.train)
    )
    assert_close(given.influence(case.test), found, 1e-8)


def test_logra_with_itself_and_its_quantities() -> None:
    case = SHORT["mlp"]
    made = make(LoGra, case, projection_dim=(2, 3))
    self_scores, formula = made.self_influence(), Formula(made, case)
    inverses = formula.inverses(made.damping_used)
    pairs = zip(formula.sides, inverses, strict=True)
    expected = torch.stack([(g @ m * d).sum(1) for (_, g, d), m in pairs]).mean(0)
    assert_close(self_scores, expected, 1e-8)
    quantities = made.compute_intermediate_quantities(case.test)
    directions = torch.cat([d for _, _, d in formula.sides], dim=1)
    assert_close(quantities @ directions.T, made.influence(case.test), 1e-8)
    assert_close(made.influence(quantities), made.influence(case.test), 1e-8)
    by_layer = torch.stack(list(made.influence_by_layer(case.test).values()))
    assert_close(by_layer.sum(0), made.influence(case.test), 1e-8)


def test_any_inverse_and_features() -> None:
    """Directions come before the features; the inverse is that of the gradients' curvature."""
    case = SHORT["mlp"]
    common = {"checkpoints": with_adam(case)[:1]}
    made = make(InfluenceFunction, case, inverse=Explicit(0.1), **common)
    exact = ExplicitInfluenceFunction(
        case.model(), Examples(case.train), case.states[:1], loss_fn=case.loss, damping=0.1
    )
    directions = sides(case)[0][2]
    expected = exact.compute_intermediate_quantities(case.test) @ directions.T
    assert_close(made.influence(case.test), expected, 1e-8)
    with pytest.raises(NotImplementedError, match="not linear in the gradient of the training"):
        made.perturbation_influence(case.test)


def test_a_store(tmp_path: Any) -> None:
    """Of plain gradients it serves any optimizer; of projected ones it holds directions, too."""
    case = SHORT["mlp"]
    for cls, own in ((GradDot, {}), (LoGra, {"projection_dim": (2, 3)})):
        folder = tmp_path / cls.__name__
        expected = make(cls, case, **own).influence(case.test)
        for _ in range(2):
            found = make(cls, case, store=folder, **own).influence(case.test)
            assert_close(found, expected, 1e-8)
    plain = make(GradDot, case, optimizer=None, store=tmp_path / "GradDot")
    assert_close(
        plain.influence(case.test), make(GradDot, case, optimizer=None).influence(case.test)
    )
    other = make(LoGra, case, optimizer=None, store=tmp_path / "LoGra", projection_dim=(2, 3))
    with pytest.raises(InvalidArgumentError, match="was built for something else"):
        other.influence(case.test)


def test_another_optimizer_state_is_noticed() -> None:
    case = SHORT["mlp"]
    saved = with_adam(case)
    made = make(LoGra, case, checkpoints=saved)
    dot = make(GradDot, case, checkpoints=saved)
    before = made.influence(case.test), dot.influence(case.test)
    saved[0]["optimizer"]["state"][0]["exp_avg"].add_(1)
    # GradDot keeps nothing
    fresh = copy.deepcopy(saved)
    assert_close(
        dot.influence(case.test), make(GradDot, case, checkpoints=fresh).influence(case.test)
    )
    assert not torch.allclose(dot.influence(case.test), before[1])
    with pytest.raises(ChangedError, match="the optimizer of checkpoint 0"):
        made.influence(case.test)
    made.forget()
    expected = make(LoGra, case, checkpoints=fresh).influence(case.test)
    assert_close(made.influence(case.test), expected)


class Doubled(FeatureMap):
    def features(self, checkpoint: int, batch: Any, loss: Any) -> Any:
        found = super().features(checkpoint, batch, loss)
        return found.scaled(torch.full((found.n,), 2.0, dtype=torch.float64))


@pytest.mark.parametrize("cls", [GradDot, GradCos, TracInCP, LoGra])
def test_errors(cls: Any) -> None:
    case = SHORT["mlp"]
    with pytest.raises(InvalidArgumentError, match=r'`optimizer` must be "adam" or None; got .sgd'):
        make(cls, case, optimizer="sgd")
    with pytest.raises(InvalidArgumentError, match="`parameter_names` are those of the optimizer"):
        make(cls, case, optimizer=None, parameter_names=["a"])
    plain = make(cls, case, checkpoints=case.checkpoints())
    with pytest.raises(InvalidArgumentError, match=r"the states of 0 optimizers.*; save {.state_d"):
        plain.influence(case.test)
    sgd = torch.optim.SGD(case.model().parameters(), lr=0.1).state_dict()
    other = make(cls, case, checkpoints=[{"state_dict": case.states[0], "optimizer": sgd}])
    with pytest.raises(InvalidArgumentError, match=r"its optimizer is not torch\.optim\.Adam or"):
        other.influence(case.test)


def test_features_that_do_not_come_of_gradients() -> None:
    match = "changes gradients before `features` maps them, and Doubled computes features from"
    with pytest.raises(InvalidArgumentError, match=match):
        make(GradDot, SHORT["mlp"], features=Doubled())
