"""The rules that ``damping`` and ``ridge`` may name, against their formulas by dense matrices."""

from contextlib import nullcontext as nothing
from functools import cache
from pathlib import Path
from typing import Any

import influence_oracles as dense
import oracles
import pytest
import slope_oracle
import torch
from cases import CASES, Examples, cross_entropy
from contract import assert_close
from damping_oracle import Counted, Rule, root
from torch import Tensor, nn
from torch.nn import functional as F
from turns import in_turn

import influence_kit
from influence_kit.curvature.kronecker_fit import KroneckerFit
from influence_kit.errors import InvalidArgumentError

METHODS = ["KFACInfluenceFunction", "EKFACInfluenceFunction"]
both = pytest.mark.parametrize("method", METHODS)
MATRICES: dict[str, list[str]] = {
    "mlp": ["body.0", "body.2", "head"],
    "cnn": ["0", "3", "6"],
    "gpt": ["qkv", "out"],
}
TABLES: dict[str, list[str]] = {"mlp": [], "cnn": [], "gpt": ["positions"]}
every_case = pytest.mark.parametrize("name", MATRICES)
EMPIRICAL: dict[str, Any] = {"curvature": "empirical_fisher"}
CLOSE = 1e-8


def make(method: str, model: nn.Module, train: Any, **own: Any) -> Any:
    arguments = {"loss_fn": cross_entropy, "batch_size": 4} | own
    states = arguments.pop("checkpoints", [model.state_dict()])
    return getattr(influence_kit, method)(model, Examples(train), states, **arguments)


def rule_of(method: str, name: str, model: nn.Module | None = None, **own: Any) -> Rule:
    case = CASES[name]
    model = case.model() if model is None else model
    arguments = {"loss": case.loss, "matrices": MATRICES[name], "tables": TABLES[name]} | own
    return Rule(model, corrected=method == METHODS[1], **arguments)


def assert_dampings(explainer: Any, *expected: float, close: float = CLOSE) -> None:
    """One value for all blocks at each checkpoint."""
    explainer.fit()
    assert len(explainer.damping_used) == len(expected)
    for used, value in zip(explainer.damping_used, expected, strict=True):
        assert list(used) == explainer.block_names
        assert len(set(used.values())) == 1
        assert next(iter(used.values())) == pytest.approx(value, rel=close, abs=0)


# The whole rule, at labels of the data.


@both
@every_case
@pytest.mark.parametrize("size", [1, 4, 11])
def test_auto(method: str, name: str, size: int) -> None:
    """Embeddings and norms take part in the misfit, not in the evidence."""
    case = CASES[name]
    explainer = make(
        method, case.model(), case.train, loss_fn=case.loss, batch_size=size, **EMPIRICAL
    )
    expected = expected_of(method, name)
    assert_dampings(explainer, expected)
    assert explainer.damping == "auto"
    scores = explainer.influence(case.test)
    explainer.damping = expected
    assert_close(explainer.influence(case.test), scores, 1e-7)


@cache
def expected_of(method: str, name: str) -> float:
    case, rule, counted = CASES[name], rule_of(method, name), Counted(CASES[name].n)
    found, evidence = rule.damping(case.train, counted), rule.evidence(case.train, counted)
    # of layers that curve together much is left out
    assert (found < evidence / 2) == (name == "gpt")
    return found


class Two(nn.Module):
    """An embedding, a norm and two layers without biases that curve alike."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(9, 4), nn.LayerNorm(4)
        self.one, self.other = (nn.Linear(4, 4, bias=False) for _ in range(2))
        self.head = nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.words(ids).mean(1))
        return self.head(x + self.one(x) + self.other(x).tanh())


def of_words() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = Two().double()
    return model, (torch.randint(0, 9, (40, 5)), torch.randint(0, 3, (40,)))


@both
def test_only_matrices_count_for_the_evidence(method: str) -> None:
    model, train = of_words()
    names = {"matrices": ["one", "other", "head"], "tables": ["words"]}
    rule = Rule(model, cross_entropy, corrected=method == METHODS[1], **names)
    expected = rule.damping(train, Counted(40))
    assert_dampings(make(method, model, train, **EMPIRICAL), expected)
    assert expected < 0.9 * rule.evidence(train, Counted(40))
    # embeddings and norms with other numbers: they are no part of |theta|^2
    with_all = Rule(
        model, cross_entropy, ["one", "other", "head", "words"], method == METHODS[1]
    ).damping(train, Counted(40))
    assert abs(with_all - expected) > 0.1 * expected


@both
def test_a_model_without_a_matrix(method: str) -> None:
    """Whatever there is counts: here the diagonal of a norm."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(3)).double()
    train = torch.randn(12, 3).double(), torch.arange(12) % 3
    rule = Rule(model, cross_entropy, [], corrected=True)
    squares = rule.curvature(train).diagonal()
    weights = float(dense.flat(model).square().sum())
    found = root(squares, weights, 12)
    expected = found / max(1.0, rule.rho(found, train))
    assert_dampings(make(method, model, train, **EMPIRICAL), expected)


# Who counts as an observation.


@both
@pytest.mark.parametrize("size", [1, 5])
def test_another_data_set_for_the_curvature(method: str, size: int) -> None:
    """The curvature and its misfit are those of the Hessian data, n that of the training set."""
    case = CASES["gpt"]
    some = tuple(part[:5] for part in case.train)
    explainer = make(
        method,
        case.model(),
        case.train,
        loss_fn=case.loss,
        hessian_dataset=Examples(some),
        batch_size=size,
        **EMPIRICAL,
    )
    rule = rule_of(method, "gpt")
    expected = rule.damping(some, Counted(11))
    assert_dampings(explainer, expected)
    assert abs(expected - rule.damping(some, Counted(5))) > 0.1 * expected


@both
@pytest.mark.parametrize("n", [1, 2, 3])
@every_case
def test_few_training_examples(method: str, name: str, n: int) -> None:
    case = CASES[name]
    train = tuple(part[:n] for part in case.train)
    explainer = make(method, case.model(), train, loss_fn=case.loss, **EMPIRICAL)
    assert_dampings(explainer, rule_of(method, name).damping(train, Counted(n)), close=1e-7)


@both
def test_every_checkpoint_has_its_own(method: str) -> None:
    case, models = CASES["gpt"], []
    for state in case.states:
        model = case.model()
        model.load_state_dict(state)
        models.append(model)
    expected = [rule_of(method, "gpt", m).damping(case.train, Counted(11)) for m in models]
    assert len({round(value, 4) for value in expected}) == 3
    own = {"loss_fn": case.loss, "checkpoints": case.states}
    assert_dampings(make(method, case.model(), case.train, **own, **EMPIRICAL), *expected)


@both
@pytest.mark.parametrize("chosen", [["qkv"], ["qkv", "norm"], ["positions", "out"]])
def test_some_layers(method: str, chosen: list[str]) -> None:
    case, model = CASES["gpt"], CASES["gpt"].model()
    rule = rule_of(
        method,
        "gpt",
        matrices=[layer for layer in chosen if layer in MATRICES["gpt"]],
        tables=[layer for layer in chosen if layer in TABLES["gpt"]],
        names=[name for name, _ in model.named_parameters() if name.split(".")[0] in chosen],
    )
    explainer = make(method, model, case.train, loss_fn=case.loss, layers=chosen, **EMPIRICAL)
    assert_dampings(explainer, rule.damping(case.train, Counted(11)))


@both
def test_frozen_layers_take_no_part(method: str) -> None:
    case, model = CASES["cnn"], CASES["cnn"].model()
    names = ["3.weight", "3.bias", "6.weight", "6.bias"]
    rule = rule_of(method, "cnn", matrices=["3", "6"], names=names)
    expected = rule.damping(case.train, Counted(11))
    for own in model[0].parameters():
        own.requires_grad_(False)
    assert_dampings(make(method, model, case.train, **EMPIRICAL), expected)


class Adapted(nn.Module):
    """A frozen layer with a low-rank adapter, of which the second factor starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 6, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.base(x) + self.up(self.down(x))).tanh())


@both
@pytest.mark.parametrize("trained", [False, True])
def test_of_adapters_only_what_is_trained_counts(method: str, trained: bool) -> None:
    torch.manual_seed(0)
    model, case = Adapted().double(), CASES["mlp"]
    if trained:
        nn.init.normal_(model.up.weight)
    layers = ["down", "up"]
    names = [f"{layer}.weight" for layer in layers]
    rule = Rule(model, cross_entropy, layers, method == METHODS[1], names=names)
    expected = rule.damping(case.train, Counted(11))
    for layer in (model.base, model.head):
        layer.requires_grad_(False)
    explainer = make(method, model, case.train, **EMPIRICAL)
    assert_dampings(explainer, expected)
    assert explainer.block_names == layers


# The units of the loss.


def over_tokens(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean over the tokens that count."""
    losses = F.cross_entropy(outputs.transpose(1, 2), targets, reduction="none")
    return losses.sum(1) / (targets >= 0).sum(1)


@both
def test_token_means_of_several_lengths(method: str) -> None:
    """N is n times the mean over labels of one over their squared share."""
    case, model = CASES["gpt"], CASES["gpt"].model()
    ids, targets = case.train
    lengths = 5 - torch.arange(11) % 4
    train = ids, targets.masked_fill(torch.arange(5) >= lengths[:, None], -100)
    count = 11 * float(lengths.sum() / (1 / lengths.double()).sum())
    expected = rule_of(method, "gpt", loss=over_tokens).damping(train, Counted(count))
    assert_dampings(make(method, model, train, loss_fn=over_tokens, **EMPIRICAL), expected)
    assert 11 * 4 < count < 11 * 25


@both
@pytest.mark.parametrize("curvature", ["fisher", "empirical_fisher"])
def test_the_mean_over_tokens_is_their_sum_in_other_units(method: str, curvature: str) -> None:
    case, model = CASES["gpt"], CASES["gpt"].model()

    def total(outputs: Tensor, targets: Tensor) -> Tensor:
        return 5 * over_tokens(outputs, targets)

    explainers = [
        make(method, model, case.train, loss_fn=loss, curvature=curvature)
        for loss in (over_tokens, total, case.loss)
    ]
    mean, times, whole = (e.influence(case.test) for e in explainers)
    assert_close(times, mean, 1e-7)
    assert_close(whole, mean, 1e-7)
    first = explainers[0].damping_used[0]["out"]
    for explainer in explainers[1:]:
        assert_dampings(explainer, 25 * first, close=1e-7)


@both
@pytest.mark.parametrize("curvature", ["fisher", "empirical_fisher"])
def test_a_loss_times_ten(method: str, curvature: str) -> None:
    """The damping is in the units of the curvature: the square of the loss's."""
    case = CASES["mlp"]

    def times_ten(outputs: Tensor, targets: Tensor) -> Tensor:
        return 10 * cross_entropy(outputs, targets)

    one, other = (
        make(method, case.model(), case.train, loss_fn=loss, curvature=curvature)
        for loss in (cross_entropy, times_ten)
    )
    assert_close(other.influence(case.test), one.influence(case.test), 1e-9)
    assert_dampings(other, 100 * one.damping_used[0]["head"], close=1e-10)


@both
@pytest.mark.parametrize("curvature", ["fisher", "empirical_fisher"])
def test_reductions_do_not_matter(method: str, curvature: str) -> None:
    case, found = CASES["mlp"], []
    for reduction in ("none", "sum", "mean"):
        loss = nn.CrossEntropyLoss(reduction=reduction)
        explainer = make(method, case.model(), case.train, loss_fn=loss, curvature=curvature)
        found.append(explainer.fit().damping_used[0]["head"])
    assert found == [pytest.approx(found[0], rel=1e-10)] * 3


def squares(factor: float, mean: bool = False) -> Any:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        each = factor * (outputs - targets).square()
        return each.mean(1) if mean else each.sum(1)

    return loss


def numbers() -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, noise = torch.randn(19, 4).double(), torch.randn(19, 3).double()
    y = (model(x) + 0.3 * noise).detach()
    return model, (x[:15], y[:15]), (x[15:], y[15:])


@both
@pytest.mark.parametrize(
    ("factor", "mean", "precision"),
    [(0.5, False, 1.0), (1.0, False, 2.0), (1.0, True, 2 / 3), (50.0, False, 100.0)],
)
@pytest.mark.parametrize("n", [3, 15])
def test_squared_errors(method: str, factor: float, mean: bool, precision: float, n: int) -> None:
    """The variance is estimated: of n times 3 residuals, less the parameters that fit them.

    There are 43 parameters, and 9 values of 3 examples.
    """
    model, (x, y), _ = numbers()
    x, y = x[:n], y[:n]
    loss = squares(factor, mean)
    variance = float((model(x) - y).detach().square().mean())
    # g g^T has the errors' variance in the place of 1 / precision
    counted = Counted(n / (precision * variance) ** 2, values=3 * n)
    rule = Rule(model, loss, ["0", "2"], method == METHODS[1])
    expected = rule.damping((x, y), counted)
    explainer = make(method, model, (x, y), loss_fn=loss, **EMPIRICAL)
    assert_dampings(explainer, expected, close=1e-7)


@both
@pytest.mark.parametrize("curvature", ["fisher", "empirical_fisher"])
def test_squared_errors_in_other_units(method: str, curvature: str) -> None:
    """Scores by sampled slopes have the units of the loss, the curvature those of its slope."""
    model, train, test = numbers()
    one, other = (
        make(method, model, train, loss_fn=squares(factor), curvature=curvature)
        for factor in (0.5, 5.0)
    )
    power = 1 if curvature == "fisher" else 2
    assert_close(other.influence(test), 10 ** (2 - power) * one.influence(test), 1e-8)
    assert_dampings(other, 10**power * one.damping_used[0]["0"], close=1e-9)


@both
def test_independent_bits(method: str) -> None:
    model, (x, y), _ = numbers()
    train, loss = (x, (y > 0).double()), nn.BCEWithLogitsLoss(reduction="none")
    rule = Rule(model, lambda o, t: loss(o, t).sum(1), ["0", "2"], method == METHODS[1])
    assert_dampings(
        make(method, model, train, loss_fn=loss, **EMPIRICAL), rule.damping(train, Counted(15))
    )


def focal(outputs: Tensor, targets: Tensor) -> Tensor:
    losses = cross_entropy(outputs, targets)
    return (1 - (-losses).exp()).square() * losses


@both
def test_of_a_loss_that_is_no_likelihood_an_example_is_an_observation(method: str) -> None:
    case = CASES["mlp"]
    expected = rule_of(method, "mlp", loss=focal).damping(case.train, Counted(11))
    assert_dampings(make(method, case.model(), case.train, loss_fn=focal, **EMPIRICAL), expected)


# At sampled slopes.


def fisher_damping(
    method: str, model: nn.Module, layers: list[str], train: Any, seed: int
) -> float:
    """The rule at independent slopes for factors, squares (EK-FAC) and sample."""
    first, second, third = (
        slope_oracle.with_slopes(model, train, own) for own in slope_oracle.seeds(seed)
    )
    if method == METHODS[0]:
        second = first
    rule = Rule(model, slope_oracle.products, layers, method == METHODS[1])
    rows = oracles.gradients(model, third, slope_oracle.products)
    return rule.damping(first, Counted(len(train[1])), second, rows)


@both
@pytest.mark.parametrize("seed", [0, 5])
@pytest.mark.parametrize("confidence", [1.0, 4.0])
def test_sampled_slopes(method: str, seed: int, confidence: float) -> None:
    model = CASES["mlp"].model()
    model.head.weight.data.mul_(confidence)
    x, y = (torch.cat([part] * 5) for part in CASES["mlp"].train)
    expected = fisher_damping(method, model, MATRICES["mlp"], (x, y), seed)
    explainer = make(method, model, (x, y), seed=seed, batch_size=16)
    assert_dampings(explainer, expected)


class Sure(nn.Module):
    """Sure of every label, by a factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.hidden, self.head, self.factor = nn.Linear(3, 4), nn.Linear(4, 3), factor
        with torch.no_grad():
            self.hidden.weight.copy_(torch.eye(4)[:, :3])
            self.head.weight.copy_(torch.eye(4)[:3])

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.head(self.hidden(x))


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("factor", [5.0, 9.0, 15.0])
def test_a_model_that_is_sure_of_every_label(
    method: str, factor: float, dtype: torch.dtype
) -> None:
    """Every sampled label would be that of the data; float32 agrees with float64."""
    torch.manual_seed(0)
    model, y = Sure(factor).to(dtype), torch.arange(30) % 3
    x = (4 * F.one_hot(y, 3) + 0.3 * torch.randn(30, 3)).to(dtype)
    # of wrong labels, whose gradients are large; 1 - p of the others rounds to 0 in float32
    wrong = (y + torch.arange(30) // 3 % 2) % 3
    explainer = make(method, model, (x, wrong))
    test = 3 + torch.arange(3)
    scores = explainer.influence((x[test], wrong[test]))
    assert bool(torch.isfinite(scores).all())
    (value,) = set(explainer.damping_used[0].values())
    exact, train = Sure(factor).double(), (x.double(), wrong)
    exact.load_state_dict(model.state_dict())
    assert float(exact(train[0]).softmax(1).amax(1).min()) > 1 - 1e-4
    expected = fisher_damping(method, exact, ["hidden", "head"], train, 0)
    close = 1e-6 if dtype == torch.float64 else 1e-3
    assert value == pytest.approx(expected, rel=close, abs=0)
    other = make(method, exact, train).influence((train[0][test], wrong[test]))
    assert_close(scores.double(), other, 1e-9 if dtype == torch.float64 else 1e-3)


# Rules by name, in all classes.


SHARES = {
    "ExplicitInfluenceFunction": ("trace", 1.0),
    "CGInfluenceFunction": ("trace", 1.0),
    "LiSSAInfluenceFunction": ("trace", 1.0),
    "NystromInfluenceFunction": ("trace", 1.0),
    "LoGra": ("trace", 1.0),
    "GraSS": ("trace", 1.0),
    "FactGraSS": ("trace", 1.0),
    "DataInf": ("mean", 0.1),
    "KFACInfluenceFunction": ("evidence", 0.1),
    "EKFACInfluenceFunction": ("evidence", 0.1),
}
OWN: dict[str, dict[str, Any]] = {
    # no more entries than a layer has: what is projected is the gradient itself
    "LoGra": {"projection_dim": (50, 50), "projection": "identity"},
    "GraSS": {"projection_dim": 50, "blow_up": 2},
    "FactGraSS": {"projection_dim": 50, "blow_up": 2},
    "LiSSAInfluenceFunction": {"recursion_depth": 3},
}
every_class = pytest.mark.parametrize("method", SHARES)


def of_class(method: str, **own: Any) -> Any:
    case = CASES["mlp"]
    arguments = {**OWN.get(method, {}), **own}
    if method not in ("DataInf", "GraSS", "FactGraSS", "LoGra"):
        arguments |= EMPIRICAL
    if method in list(SHARES)[:4]:
        arguments["blocks"] = "layer"
    return make(method, case.model(), case.train, **arguments)


@every_class
@pytest.mark.parametrize("rule", ["mean", "trace"])
def test_a_rule_of_traces(method: str, rule: str) -> None:
    """A share of the trace over all entries of a block, or over n of them at most."""
    case, share = CASES["mlp"], SHARES[method][1]
    g = oracles.gradients(case.model(), case.train, case.loss)
    explainer = of_class(method, damping=rule).fit()
    (used,) = explainer.damping_used
    sizes = {"body.0": 30, "body.2": 35, "head": 18}
    assert list(used) == list(sizes)
    for (block, size), rows in zip(sizes.items(), g.split(list(sizes.values()), 1), strict=True):
        trace = float(rows.square().sum(1).mean())
        if method == "KFACInfluenceFunction":
            model = case.model()
            seen = dense.record(model, model.get_submodule(block), case.train, case.loss)
            trace = float(dense.kfac_matrix(seen).trace())
        expected = share * trace / (size if rule == "mean" else min(11, size))
        close = 0.5 if method == "CGInfluenceFunction" else 1e-8
        assert used[block] == pytest.approx(expected, rel=close), block
    assert explainer.damping == rule


@every_class
def test_auto_is_a_rule_by_name(method: str) -> None:
    named = of_class(method, damping=SHARES[method][0]).fit()
    explainer = of_class(method).fit()
    assert explainer.damping == "auto"
    assert explainer.damping_used == named.damping_used
    test = CASES["mlp"].test
    assert torch.equal(explainer.influence(test), named.influence(test))


@pytest.mark.parametrize("method", [m for m in SHARES if m not in METHODS])
def test_the_evidence_is_a_rule_of_two_classes(method: str) -> None:
    match = '`damping` must be a number, a dict by block or one of "auto", "mean", "trace"'
    with pytest.raises(InvalidArgumentError, match=match):
        of_class(method, damping="evidence")


@pytest.mark.parametrize("rule", ["mean", "trace", "auto"])
@pytest.mark.parametrize("dim", [5, 40])
@pytest.mark.parametrize("count", [1, 3])
def test_rules_of_the_ridge(rule: str, dim: int, count: int) -> None:
    """1.5 / sqrt(checkpoints) of the trace of Phi^T Phi over the entries, or n of them at most."""
    case = CASES["mlp"]
    own = {"projection_dim": dim, "ridge": rule}
    trak = influence_kit.TRAK(case.model(), Examples(case.train), case.states[:count], **own)
    with pytest.warns(UserWarning, match="Phi is singular") if dim > 11 else nothing():
        trak.fit()
    traces = [float(facts["gram"].trace()) for facts in trak.fit_state.values()]
    share = 1.5 / count**0.5 / (dim if rule == "mean" else min(dim, 11))
    assert trak.ridge_used == [pytest.approx(share * trace, rel=1e-12) for trace in traces]
    match = '`ridge` must be a number, a dict by block or one of "auto", "mean", "trace"'
    with pytest.raises(InvalidArgumentError, match=match):
        trak.ridge = "evidence"


@in_turn(
    "curvature, method, dtype",
    ["fisher", "empirical_fisher"],
    METHODS,
    [torch.float32, torch.bfloat16, torch.float16],
)
def test_models_of_other_precision(method: str, dtype: torch.dtype, curvature: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    x, y = torch.randn(60, 6, dtype=dtype), torch.arange(60) % 3
    exact = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    exact.load_state_dict(model.state_dict())
    found, expected = (
        make(method, own, (inputs, y), curvature=curvature).fit().damping_used[0]["0"]
        for own, inputs in ((model, x), (exact, x.double()))
    )
    assert found == pytest.approx(expected, rel=1e-5 if dtype == torch.float32 else 0.02)


# What is fitted once.


def nothing_is_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the curvature was measured again")

    monkeypatch.setattr(KroneckerFit, "__call__", refuse)


@both
@pytest.mark.parametrize("curvature", ["fisher", "empirical_fisher"])
def test_setting_the_damping_fits_nothing_again(
    method: str, curvature: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES["gpt"]
    own = {"loss_fn": case.loss, "curvature": curvature}
    dampings = ["auto", "mean", 0.3, "trace", "evidence", "auto"]
    expected = {
        damping: make(method, case.model(), case.train, damping=damping, **own)
        for damping in dampings
    }
    wanted = {damping: e.influence(case.test) for damping, e in expected.items()}
    explainer = make(method, case.model(), case.train, damping=0.1, **own).fit()
    by_block = dict.fromkeys(explainer.block_names, 0.1)
    assert explainer.damping_used == [by_block]
    nothing_is_fitted(monkeypatch)
    for damping in dampings:
        explainer.damping = damping
        assert_close(explainer.influence(case.test), wanted[damping], 1e-10)
        assert explainer.damping == damping
        assert explainer.damping_used == [
            {b: pytest.approx(v, rel=1e-10) for b, v in used.items()}
            for used in expected[damping].damping_used
        ]
    explainer.damping = by_block
    assert explainer.damping_used == [by_block]


@in_turn(
    "curvature, method, saved_with",
    ["fisher", "empirical_fisher"],
    METHODS,
    ["auto", "mean", 0.3],
)
def test_a_saved_fit_has_the_same_damping(
    method: str, curvature: str, saved_with: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the evidence was not asked for before it was saved."""
    case = CASES["gpt"]
    own = {"loss_fn": case.loss, "curvature": curvature, "checkpoints": case.states[:2]}
    whole = make(method, case.model(), case.train, **own)
    expected = whole.influence(case.test)
    saved = make(method, case.model(), case.train, damping=saved_with, **own)
    saved.save(tmp_path)
    nothing_is_fitted(monkeypatch)
    loaded = make(method, case.model(), case.train, **own).load(tmp_path)
    assert_close(loaded.influence(case.test), expected, 1e-10)
    for found, wanted in zip(loaded.damping_used, whole.damping_used, strict=True):
        assert found == {block: pytest.approx(v, rel=1e-10) for block, v in wanted.items()}


@both
def test_weights_that_are_zero_decide_no_damping(method: str) -> None:
    model, case = nn.Sequential(nn.Linear(4, 3)).double(), CASES["mlp"]
    for own in model.parameters():
        nn.init.zeros_(own)
    explainer = make(method, model, case.train)
    with pytest.raises(InvalidArgumentError, match="has no maximum: all weights are zero"):
        explainer.fit()
    explainer.damping = "mean"
    assert explainer.influence(case.test).isfinite().all()


@both
def test_errors_that_are_zero_decide_no_damping(method: str) -> None:
    model, (x, _), _ = numbers()
    explainer = make(method, model, (x, model(x).detach()), loss_fn=squares(1.0))
    with pytest.raises(InvalidArgumentError, match="the model's errors are all zero"):
        explainer.fit()
    explainer = make(method, model, (x, model(x).detach()), loss_fn=squares(1.0), **EMPIRICAL)
    with pytest.raises(InvalidArgumentError, match="no eigenvalue of the curvature is positive"):
        explainer.fit()


@pytest.mark.parametrize("method", ["KFACInfluenceFunction", "EKFACInfluenceFunction"])
def test_a_loss_of_unknown_reduction_is_settled_before_slopes_are_sampled(method: str) -> None:
    torch.manual_seed(0)
    model, x, y = torch.nn.Linear(3, 2).double(), torch.randn(40, 3).double(), torch.arange(40) % 2
    data, scores = torch.utils.data.TensorDataset(x, y), []
    for loss in (
        lambda o, t: torch.nn.functional.cross_entropy(o, t),
        torch.nn.CrossEntropyLoss(reduction="none"),
    ):
        make = getattr(influence_kit, method)
        explainer = make(model, data, [model.state_dict()], loss_fn=loss, batch_size=16)
        scores.append(explainer.influence((x[:4], y[:4])))
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-9, atol=0)
