"""damping="learning_rates": one over the sum of the learning rates, in the units of each class."""

import itertools
from typing import Any

import pytest
import torch
from contract import assert_close
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import influence_kit
from influence_kit import KFACInfluenceFunction
from influence_kit.curvature import kronecker_curvature, sampled_slopes
from influence_kit.curvature.observations import curvature_factor
from influence_kit.errors import InvalidArgumentError

N = 12
X = torch.randn(N, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(N) % 3
DATA, TEST = TensorDataset(X, Y), (X[:4] + 1, Y[:4])
RULE = "learning_rates"
EXACT = [
    "ExplicitInfluenceFunction",
    "CGInfluenceFunction",
    "LiSSAInfluenceFunction",
    "NystromInfluenceFunction",
]
KRONECKER = ["KFACInfluenceFunction", "EKFACInfluenceFunction"]
OPTIONS: dict[str, dict[str, Any]] = {
    "LiSSAInfluenceFunction": {"recursion_depth": 500, "hessian_batch_size": None}
}


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def trained() -> tuple[nn.Module, list[dict[str, Any]], list[float]]:
    """A model, checkpoints with all that a loop saves, and 1 / the sum of the rates applied."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.5)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
    checkpoints, dampings, total = [], [], 0.0
    for step in range(1, 51):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        total += optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler.step()
        if step in (20, 50):
            state = {key: value.clone() for key, value in model.state_dict().items()}
            held = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
            checkpoints.append({"model": state, **held, "step": step})
            dampings.append((1 - 0.5) / total)
    return model, checkpoints, dampings


def make(method: str, model: nn.Module, checkpoints: Any, **options: Any) -> Any:
    options = {"loss_fn": nn.CrossEntropyLoss(), **OPTIONS.get(method, {}), **options}
    return getattr(influence_kit, method)(model, DATA, checkpoints, **options)


@pytest.mark.parametrize("method", EXACT)
def test_each_checkpoint_has_one_over_its_own_sum(method: str) -> None:
    model, checkpoints, dampings = trained()
    found = make(method, model, checkpoints, damping=RULE)
    scores = found.influence(TEST)
    used = [pytest.approx({"full": damping}, rel=1e-9) for damping in dampings]
    assert found.damping_used == used
    each = [
        make(method, model, [checkpoint], damping=damping).influence(TEST)
        for checkpoint, damping in zip(checkpoints, dampings, strict=True)
    ]
    assert_close(scores, torch.stack(each).mean(0), 1e-6)


def test_one_value_counts_for_all_blocks_and_is_set_by_name() -> None:
    model, checkpoints, dampings = trained()
    found = make("ExplicitInfluenceFunction", model, checkpoints[:1], blocks="parameter")
    found.fit()
    found.damping = RULE
    found.influence(TEST)
    names = dict.fromkeys(dict(model.named_parameters()), dampings[0])
    assert found.damping_used == [pytest.approx(names, rel=1e-9)]


def test_a_saved_fit_has_it(tmp_path: Any) -> None:
    model, checkpoints, _ = trained()
    first = make("EKFACInfluenceFunction", model, checkpoints, damping=RULE)
    first.save(tmp_path / "fit")
    again = make("EKFACInfluenceFunction", model, checkpoints, damping=RULE)
    again.load(tmp_path / "fit")
    assert again.damping_used == first.damping_used
    assert_close(again.influence(TEST), first.influence(TEST))


@pytest.mark.parametrize("method", KRONECKER)
def test_kronecker_factors_have_it_in_their_own_units(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over what their eigenvalues lack of the curvature on average, and what they leave out."""
    monkeypatch.setattr(kronecker_curvature, "misfit", lambda *arguments: 4.0)
    model, checkpoints, dampings = trained()
    found = make(method, model, checkpoints, damping=RULE).fit()
    factors = [curvature_factor(found.fit_state[place]["observations"], False) for place in (0, 1)]
    for used, damping, factor in zip(found.damping_used, dampings, factors, strict=True):
        assert used == pytest.approx(dict.fromkeys("02", damping / factor / 4), rel=1e-9)


LINEAR = nn.Linear(3, 3).double()
# each is one away from the prediction, so that all have the variance of the mean
NUMBERS = LINEAR(X).detach() + torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)


def ggn_trace(loss: Any, labels: Tensor) -> float:
    """The trace of the Gauss-Newton matrix of a linear model's mean loss."""
    total = 0.0
    for x, y in zip(X, labels, strict=True):

        def of_outputs(out: Tensor, y: Tensor = y) -> Tensor:
            return loss(out.unsqueeze(0), y.unsqueeze(0))

        hessian = torch.autograd.functional.hessian(of_outputs, LINEAR(x).detach())
        total += float(hessian.diagonal().sum() * (x.square().sum() + 1))
    return total / N


@pytest.mark.parametrize(
    ("loss", "labels", "curvature"),
    [
        (nn.CrossEntropyLoss(), Y, "fisher"),
        (nn.MSELoss(), NUMBERS, "fisher"),
        (nn.MSELoss(), NUMBERS, "empirical_fisher"),
        (nn.MSELoss(reduction="sum"), NUMBERS, "empirical_fisher"),
    ],
)
def test_the_units_of_outer_products_against_the_gauss_newton_matrix(
    loss: Any, labels: Tensor, curvature: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean squared gradient over all random signs is the trace, in the units of the loss."""
    data, states = TensorDataset(X, labels), [LINEAR.state_dict()]
    found = KFACInfluenceFunction(LINEAR, data, states, loss_fn=loss, curvature=curvature).fit()
    with found.session() as loader:
        observed = found._fit_data(0, loader).observed(0, draw=0, at_data=curvature != "fisher")
    traces = []
    for pattern in itertools.product((-1.0, 1.0), repeat=3):

        def signs(*_: Any, own: Any = pattern) -> Tensor:
            return torch.tensor(own).repeat(N, 1, 1)

        monkeypatch.setattr(sampled_slopes, "signs", signs)
        with found.session() as loader:
            loader.load(0)
            gradients, _ = observed(torch.arange(N), (X, labels))
        traces.append(float(gradients.squared_norms().double().mean()))
    factor = curvature_factor(found.fit_state[0]["observations"], curvature != "fisher")
    trace = sum(traces) / len(traces)
    assert trace * factor == pytest.approx(ggn_trace(loss, labels), rel=1e-9)


def test_the_units_of_a_mean_over_tokens() -> None:
    # N counts T^2 for each example, and the Fisher of a mean over T is T times too small
    facts = torch.tensor([64.0**2, torch.inf], dtype=torch.float64)
    assert curvature_factor(facts, False) == pytest.approx(64.0)


@pytest.mark.parametrize("method", [*EXACT, *KRONECKER])
def test_what_is_missing_is_said_with_the_other_rules(method: str) -> None:
    model = network()
    bad = {"model": model.state_dict(), "learning_rate": 0.1, "epoch": 3}
    others = '"auto", "evidence", "mean"' if method in KRONECKER else '"auto", "mean", "trace"'
    match = (
        r'damping="learning_rates" is one over .* for checkpoint 0 \(in memory\): it lacks the '
        rf"number of optimizer steps .* Other rules are {others}.*; or give a number"
    )
    with pytest.raises(InvalidArgumentError, match=match):
        make(method, model, [bad], damping=RULE).influence(TEST)


def test_adam_is_refused() -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    F.cross_entropy(model(X), Y).backward()
    optimizer.step()
    one = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 1}
    match = r"its optimizer is Adam, AdamW or similar .* Other rules are \"auto\", \"evidence\""
    with pytest.raises(InvalidArgumentError, match=match):
        make("EKFACInfluenceFunction", model, [one], damping=RULE).fit()


@pytest.mark.parametrize("method", ["LoGra", "GraSS", "FactGraSS", "DataInf", "TRAK"])
def test_classes_whose_units_are_others_do_not_know_the_rule(method: str) -> None:
    model, checkpoints, _ = trained()
    own: dict[str, Any] = {"damping": RULE}
    if method == "TRAK":
        own = {"ridge": RULE}
    match = r'must be a number, a dict by block or one of "auto", "mean", "trace"; got'
    with pytest.raises(InvalidArgumentError, match=match):
        make(method, model, checkpoints, **own)
