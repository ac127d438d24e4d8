"""What ``repr`` of every method says: the arguments that are not defaults, and what was used."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES
from contract import METHODS, build
from torch import nn
from torch.utils.data import TensorDataset

import influence_kit
from influence_kit import classification_margin
from influence_kit.core.summary import counted, value_text
from influence_kit.valuation import DataOOB, TMCShapley

X, Y = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3
TRAIN, TESTS, LOSS = TensorDataset(X, Y), (X[:4], Y[:4]), nn.CrossEntropyLoss()


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))


def make(name: str, count: int = 1, **keywords: Any) -> Any:
    own, network = {"loss_fn": LOSS, **keywords}, model()
    weights = [{k: v * (1 + c) for k, v in network.state_dict().items()} for c in range(count)]
    return getattr(influence_kit, name)(network, TRAIN, weights, **own)


def lines(method: Any) -> list[str]:
    head, *notes = repr(method).splitlines()
    assert all(note.startswith("  ") for note in notes)
    return [head, *(note.strip() for note in notes)]


def test_the_class_what_it_was_given_and_how_large_it_is() -> None:
    assert lines(make("GradDot", 2)) == [
        "GradDot(loss_fn=CrossEntropyLoss)",
        "2 checkpoints, 123 parameters in 2 layers",
    ]
    given = make("TracInCP", layers="2", test_output_fn=classification_margin, eval_mode=False)
    assert lines(given) == [
        'TracInCP(layers=["2"], loss_fn=CrossEntropyLoss, test_output_fn=classification_margin, '
        "eval_mode=False)",
        "1 checkpoint, 39 parameters in 1 layer",
    ]


def test_a_damping_before_and_after_it_is_known() -> None:
    ekfac = make("EKFACInfluenceFunction", 2, relative="l", seed=3)
    assert lines(ekfac)[0] == (
        'EKFACInfluenceFunction(loss_fn=CrossEntropyLoss, relative="l", seed=3)'
    )
    assert lines(ekfac)[-1] == 'damping="auto" (rule "evidence"), not fitted'
    ekfac.influence(TESTS)
    used = sorted({value for own in ekfac.damping_used for value in own.values()})
    assert len(used) == 2
    assert lines(ekfac)[-1] == (f'damping="auto" (rule "evidence"), {used[0]:.3g} to {used[1]:.3g}')
    ekfac.damping = "mean"
    assert lines(ekfac)[-1] == 'damping="mean", not fitted'
    ekfac.influence(TESTS)
    used = sorted(value for own in ekfac.damping_used for value in own.values())
    assert lines(ekfac)[-1] == f'damping="mean", {used[0]:.3g} to {used[-1]:.3g}'
    ekfac.damping = 0.25
    assert lines(ekfac)[-1] == "damping=0.25"
    ekfac.damping = {"0": 0.5, "2": 1e-3}
    assert lines(ekfac)[-1] == "damping by block, 0.001 to 0.5"
    assert lines(make("DataInf", damping={"0": 0.5, "2": 0.5}))[-1] == (
        "damping by block, not fitted"
    )


def test_of_one_block_there_is_one_damping_and_of_trak_a_ridge() -> None:
    exact = make("ExplicitInfluenceFunction", hessian_dataset=TRAIN).fit()
    exact.influence(TESTS)
    used = exact.damping_used[0]["full"]
    assert lines(exact) == [
        "ExplicitInfluenceFunction(loss_fn=CrossEntropyLoss, hessian_dataset=TensorDataset)",
        "1 checkpoint, 123 parameters in 2 layers",
        f'damping="auto" (rule "trace"), {used:.3g}',
    ]
    trak = make("TRAK", loss_fn=None, projection_dim=16)
    trak.influence(TESTS)
    assert lines(trak)[::2] == [
        "TRAK(projection_dim=16)",
        f'ridge="auto" (rule "trace"), {trak.ridge_used[0]:.3g}',
    ]


def test_a_model_that_was_changed_since_is_no_error() -> None:
    fitted = make("KFACInfluenceFunction", damping={"0": 0.5, "2": 1.0}).fit()
    fitted.model[0] = nn.Linear(6, 12)
    assert lines(fitted)[-1] == "damping by block, 0.5 to 1"


def test_layers_by_their_names_and_methods_without_gradients(tmp_path: Path) -> None:
    network = model()
    fast = influence_kit.TracInCPFast(
        network, network[2], TRAIN, [network.state_dict()], loss_fn=LOSS
    )
    assert lines(fast)[0] == 'TracInCPFast(final_fc_layer="2", loss_fn=CrossEntropyLoss)'
    knn = influence_kit.KNNShapley(network, TRAIN, [network.state_dict()], layer="1")
    assert lines(knn) == ['KNNShapley(layer="1")', "1 checkpoint"]
    assert lines(influence_kit.KNNShapley(network, TRAIN)) == ["KNNShapley()"]
    similar = influence_kit.SimilarityInfluence(network, "0", X, tmp_path, batch_size=4)
    assert lines(similar) == [
        f'SimilarityInfluence(layers=["0"], activation_dir="{tmp_path}", batch_size=4)'
    ]


def test_captums_own_argument_and_valuations() -> None:
    network = model()
    naive = influence_kit.NaiveInfluenceFunction(
        network, TRAIN, network.state_dict(), loss_fn=LOSS, hessian_reg=0.5
    )
    assert lines(naive)[::2] == [
        "NaiveInfluenceFunction(loss_fn=CrossEntropyLoss)",
        "hessian_reg=0.5",
    ]

    def fit(places: np.ndarray) -> int:
        return len(places)

    def score(fitted: int, inputs: Any) -> float:
        return float(fitted)

    assert repr(TMCShapley(fit, score, 10, seed=3)) == (
        "TMCShapley(fit=fit, score=score, train_count=10, seed=3)"
    )
    assert repr(DataOOB(fit, score, 10)) == "DataOOB(fit=fit, score=score, train_count=10)"


def test_a_subclass_of_a_users_and_one_that_is_not_made_yet() -> None:
    class Mine(influence_kit.GradDot):
        def __init__(self, *args: Any, mine: int = 1, **keywords: Any) -> None:
            self.seen = repr(self)
            super().__init__(*args, **keywords)

    found = Mine(model(), TRAIN, [model().state_dict()], loss_fn=LOSS)
    assert lines(found)[0] == "Mine(loss_fn=CrossEntropyLoss)"
    assert found.seen.startswith("<")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_one(method: str) -> None:
    made = build(method, CASES["mlp"])
    assert lines(made)[0].startswith(f"{type(made).__name__}(")
    assert len(repr(made)) < 400


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "None"),
        (True, "True"),
        (1e-5, "1e-05"),
        ("a", '"a"'),
        (torch.float16, "torch.float16"),
        (torch.zeros(3, 4), "Tensor [3, 4]"),
        (np.zeros(2), "ndarray [2]"),
        ((1, 2), "(1, 2)"),
        (["a"] * 5, "list of 5"),
        ({"a": 1.0}, '{"a": 1}'),
        (classification_margin, "classification_margin"),
        (LOSS, "CrossEntropyLoss"),
        (nn.Linear, "Linear"),
    ],
)
def test_values_are_short(value: Any, text: str) -> None:
    assert value_text(value) == text


def test_numbers_have_their_nouns() -> None:
    assert [counted(1, "layer"), counted(1234, "parameter")] == ["1 layer", "1,234 parameters"]
