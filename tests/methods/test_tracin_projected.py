"""TracIn of projected gradients against its formula written out, given the same random matrices."""

from typing import Any

import oracles
import projected_oracles as projected
import pytest
import torch
from cases import CASES, RATES, Examples
from contract import assert_close
from torch import Tensor

from influence_kit import GradDot, TracInCP, TracInCPRandProj
from influence_kit.errors import InvalidArgumentError

every_case = pytest.mark.parametrize("name", ["mlp", "dict", "cnn", "gpt"])


def make(name: str, **changed: Any) -> TracInCPRandProj:
    case = CASES[name]
    arguments = {"loss_fn": case.loss, "batch_size": 4, "projection_dim": (2, 3)} | changed
    checkpoints = arguments.pop("checkpoints", None) or case.checkpoints()
    return TracInCPRandProj(case.model(), Examples(case.train), checkpoints, **arguments)


def images(influence: TracInCPRandProj, name: str, place: int, batch: Any) -> Tensor:
    """The projected gradients at a checkpoint, ``[n, K]``."""
    case, model = CASES[name], CASES[name].model()
    model.load_state_dict(case.states[place])
    names = [n for n, _ in model.named_parameters()]
    columns = projected.written_out(model, names, influence._map.maps.maps)
    return oracles.gradients(model, batch, case.loss) @ torch.cat(list(columns.values()), dim=1)


def formula(influence: TracInCPRandProj, name: str, test: Any, rates: list[float]) -> Tensor:
    pairs = (
        (images(influence, name, c, test), images(influence, name, c, CASES[name].train))
        for c in range(3)
    )
    return sum(rate * h @ g.T for rate, (h, g) in zip(rates, pairs, strict=True))


@every_case
@pytest.mark.parametrize("projection", ["orthogonal", "gaussian", "rademacher", "identity"])
@pytest.mark.parametrize("dim", [(2, 3), 7])
def test_scores_are_the_formula(name: str, projection: str, dim: Any) -> None:
    influence = make(name, projection=projection, projection_dim=dim)
    case = CASES[name]
    expected = formula(influence, name, case.test, RATES)
    assert_close(influence.influence(case.test), expected)
    assert_close(sum(influence.influence_by_layer(case.test).values()), expected)
    own = formula(influence, name, case.train, RATES).diagonal()
    assert_close(influence.self_influence(), own)


@every_case
def test_checkpoints_without_a_rate_count_one(name: str) -> None:
    case = CASES[name]
    influence = make(name, checkpoints=case.states)
    expected = formula(influence, name, case.test, [1.0] * 3)
    assert_close(influence.influence(case.test), expected)


@every_case
def test_nothing_projected_is_tracin_or_grad_dot(name: str) -> None:
    case = CASES[name]
    given = case.model(), Examples(case.train)
    for cls, checkpoints in ((TracInCP, case.checkpoints()), (GradDot, case.states)):
        exact = cls(*given, checkpoints, loss_fn=case.loss).influence(case.test)
        for changed in ({"projection": "identity"}, {"projection_dim": 10**6}):
            found = make(name, checkpoints=checkpoints, **changed)
            assert_close(found.influence(case.test), exact)


def test_scores_are_those_of_tracin_on_average() -> None:
    case, seeds = CASES["mlp"], 100
    exact = TracInCP(case.model(), Examples(case.train), case.checkpoints(), loss_fn=case.loss)
    found = torch.stack([make("mlp", seed=s).influence(case.test) for s in range(seeds)])
    error = found.std(0) / seeds**0.5
    # 44 means: five standard errors have a chance of 3e-5 in all
    assert ((found.mean(0) - exact.influence(case.test)).abs() / error).max() < 5


def test_training_gradients_are_computed_once() -> None:
    case = CASES["mlp"]
    influence = make("mlp", verify="once")
    first = influence.influence(case.test)
    passes: list[int] = []
    influence.model.register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    assert torch.equal(influence.influence(case.test), first)
    # one to see what it takes, the test examples at each checkpoint, and examples that show that
    # the model is the same
    assert sorted(passes) == sorted([4, 4, 1, *[case.m] * 3])


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"projection": "sjlt"}, "`projection` must be one of gaussian, .*; got 'sjlt'"),
        ({"projection_dim": 0}, "`projection_dim` must be a positive int, or a pair .*; got 0"),
        ({"seed": -1}, "`seed` must be an int that is not negative; got -1"),
    ],
)
def test_arguments_that_cannot_be_meant(changed: Any, match: str) -> None:
    with pytest.raises(InvalidArgumentError, match=match):
        make("mlp", **changed)
