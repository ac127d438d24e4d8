"""TRAK against its formula: margins' gradients by autograd, normal equations, means."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import oracles
import projected_oracles as projected
import pytest
import torch
from cases import CASES, Examples, TanhMLP
from contract import assert_close
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from turns import in_turn

from influence_kit import TRAK
from influence_kit.errors import CurvatureError, InvalidArgumentError, NonFiniteError
from influence_kit.methods.trak.normal_equations import inverse_of

CLOSE = 1e-8
NAMES = ["mlp", "dict", "cnn", "gpt"]
KINDS = ["sjlt", "rademacher", "gaussian", "identity"]
DIM = 7
every_case = pytest.mark.parametrize("name", NAMES)
every_kind = pytest.mark.parametrize("projection", KINDS)
# where there are more features than examples
pytestmark = pytest.mark.filterwarnings("ignore:.*Phi is singular, and only the ridge.*")


def make(name: str = "mlp", **changed: Any) -> TRAK:
    """TRAK on a case's three checkpoints; ``changed`` replaces any argument."""
    case = CASES[name]
    model = changed.pop("model", None) or case.model()
    data = changed.pop("data", Examples(case.train))
    checkpoints = changed.pop("checkpoints", None) or case.checkpoints()
    arguments = {"projection_dim": DIM, "batch_size": 4}
    return TRAK(model, data, checkpoints, **arguments | changed)


# The formula.


def margin(outputs: Any, targets: Any) -> Tensor:
    """Log p - log(1 - p) by the probabilities themselves, summed over positions: one example."""
    if isinstance(outputs, dict):
        outputs, targets = outputs["logits"], targets["labels"]
    p = outputs.softmax(-1).flatten(0, -2)[torch.arange(targets.numel()), targets.flatten()]
    return (p.log() - (1 - p).log()).sum()


@cache
def model_at(name: str, place: int) -> nn.Module:
    model = CASES[name].model()
    model.load_state_dict(CASES[name].states[place])
    return model


@cache
def gradients(name: str, place: int, of_test: bool) -> Tensor:
    case = CASES[name]
    return oracles.gradients(model_at(name, place), case.test if of_test else case.train, margin)


@cache
def one_minus_p(name: str, place: int, of_test: bool = False) -> Tensor:
    """Of each example the mean over its positions, ``[n]``."""
    case = CASES[name]
    found = []
    batch = case.test if of_test else case.train
    for i in range(oracles.count(batch)):
        example = oracles.one(batch, i)
        outputs = (
            oracles.forward(model_at(name, place), example).detach()
            if name != "dict"
            else (oracles.forward(model_at(name, place), example)["logits"].detach())
        )
        labels = example["labels"] if name == "dict" else example[-1]
        p = outputs.softmax(-1).flatten(0, -2)[torch.arange(labels.numel()), labels.flatten()]
        found.append((1 - p).mean())
    return torch.stack(found)


def matrix(trak: TRAK, name: str, place: int) -> Tensor:
    """The projection at a checkpoint, ``[P, k]``."""
    maps = trak._map._at(place).maps
    names = [n for n, _ in model_at(name, place).named_parameters()]
    assert list(maps) == names
    return torch.cat([maps[n].matrix(projected.LIKE) for n in names])


def automatic(phi: Tensor, checkpoints: int) -> float:
    """1.5 / sqrt(C) times the mean of the eigenvalues of Phi^T Phi that n examples can make."""
    values = torch.linalg.eigvalsh(phi.T @ phi).sort(descending=True).values
    return 1.5 / checkpoints**0.5 * values[: len(phi)].mean().item()


def formula(
    trak: TRAK, name: str, ridge: float | str, places: tuple[int, ...] = (0, 1, 2)
) -> Tensor:
    """Mean of phi_test (Phi^T Phi + ridge)^-1 phi_train, times mean of 1 - p."""
    products, slopes = [], []
    for number, place in enumerate(places):
        p = matrix(trak, name, number)
        phi, tests = gradients(name, place, False) @ p, gradients(name, place, True) @ p
        value = automatic(phi, len(places)) if ridge == "auto" else float(ridge)
        normal = phi.T @ phi + value * torch.eye(phi.shape[1], dtype=phi.dtype)
        products.append(tests @ torch.linalg.solve(normal, phi.T))
        slopes.append(one_minus_p(name, place))
    return torch.stack(products).mean(0) * torch.stack(slopes).mean(0)


def medians(trak: TRAK, name: str) -> float:
    """The least over checkpoints of the median eigenvalue of Phi^T Phi that is not zero."""
    found = []
    for place in range(3):
        values = torch.linalg.eigvalsh(
            (phi := gradients(name, place, False) @ matrix(trak, name, place)).T @ phi
        )
        found.append(values[values > 1e-10 * values.max()].median().item())
    return min(found)


@every_case
@every_kind
@pytest.mark.parametrize("share", [1.0, 1e-2])
def test_scores_are_the_formula(name: str, projection: str, share: float) -> None:
    trak = make(name, projection=projection)
    ridge = share * medians(trak, name)
    trak.ridge = ridge
    expected = formula(trak, name, ridge)
    found = trak.influence(CASES[name].test)
    assert_close(found, expected, CLOSE)
    assert trak.ridge_used == [ridge] * 3
    dots = sum(
        gradients(name, c, True)
        @ matrix(trak, name, c)
        @ (gradients(name, c, False) @ matrix(trak, name, c)).T
        for c in range(3)
    ) * torch.stack([one_minus_p(name, c) for c in range(3)]).mean(0)
    cosine = F.cosine_similarity(expected.flatten(), dots.flatten(), dim=0)
    assert cosine < 0.97, "the ridge must not hide the normal equations"


@in_turn("dim, name, projection", [1, 5, 30], NAMES, KINDS)
def test_automatic_ridge(name: str, projection: str, dim: int) -> None:
    trak = make(name, projection=projection, projection_dim=dim)
    assert_close(trak.influence(CASES[name].test), formula(trak, name, "auto"), CLOSE)
    expected = [automatic(gradients(name, c, False) @ matrix(trak, name, c), 3) for c in range(3)]
    assert trak.ridge_used == pytest.approx(expected, rel=1e-9)
    assert trak.ridge == "auto"


def test_the_oracle_of_the_identity_projects_nothing() -> None:
    trak = make(projection="identity")
    p = matrix(trak, "mlp", 0)
    assert torch.equal(p, torch.eye(len(p), dtype=torch.float64))


@every_case
@pytest.mark.parametrize("place", [0, 2])
def test_one_checkpoint(name: str, place: int) -> None:
    trak = make(name, checkpoints=CASES[name].checkpoints()[place : place + 1])
    expected = formula(trak, name, "auto", (place,))
    assert_close(trak.influence(CASES[name].test), expected, CLOSE)


@every_case
def test_checkpoints_have_projections_of_their_own(name: str) -> None:
    trak = make(name)
    first, second, third = (matrix(trak, name, place) for place in range(3))
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)
    assert torch.equal(first, matrix(make(name), name, 0))
    assert not torch.equal(first, matrix(make(name, seed=1), name, 0))


@every_kind
def test_features_keep_inner_products_on_average(projection: str) -> None:
    """Of all parameters together: parts that were drawn alike would not add up."""
    seeds = 150
    h, g = gradients("mlp", 0, True), gradients("mlp", 0, False)
    found = []
    for seed in range(seeds):
        p = matrix(make(projection=projection, seed=seed), "mlp", 0)
        found.append((h @ p) @ (g @ p).T)
    products = torch.stack(found)
    error = products.std(0) / seeds**0.5
    # 44 means: five standard errors have a chance of 3e-5 in all
    assert bool(((products.mean(0) - h @ g.T).abs() <= 5 * error + 1e-12).all())


# Sums over parameters.


@every_case
@every_kind
def test_scores_by_layer(name: str, projection: str) -> None:
    """What the training example's gradient in a layer adds to its features."""
    trak = make(name, projection=projection)
    ridge = medians(trak, name)
    trak.ridge = ridge
    found = trak.influence_by_layer(CASES[name].test)
    expected = {}
    for layer in found:
        parts = []
        for c in range(3):
            p, g = matrix(trak, name, c), gradients(name, c, False)
            phi, tests = g @ p, gradients(name, c, True) @ p
            normal = phi.T @ phi + ridge * torch.eye(phi.shape[1], dtype=phi.dtype)
            model = model_at(name, c)
            names = [n for n, _ in model.named_parameters()]
            own = projected.places(
                model, names, [n for n in names if n.rpartition(".")[0] == layer]
            )
            parts.append(tests @ torch.linalg.solve(normal, (g[:, own] @ p[own]).T))
        slopes = torch.stack([one_minus_p(name, c) for c in range(3)]).mean(0)
        expected[layer] = torch.stack(parts).mean(0) * slopes
    whole = formula(trak, name, ridge)
    assert_close(sum(expected.values()), whole, CLOSE)
    for layer, scores in expected.items():
        assert (found[layer] - scores).abs().max() <= CLOSE * whole.abs().max()


def test_some_layers() -> None:
    trak = make(layers=["head"], projection="identity", ridge=0.1)
    names = ["head.weight", "head.bias"]
    products = []
    for c in range(3):
        sides = [
            oracles.gradients(model_at("mlp", c), batch, margin, names)
            for batch in (CASES["mlp"].test, CASES["mlp"].train)
        ]
        normal = sides[1].T @ sides[1] + 0.1 * torch.eye(sides[1].shape[1]).double()
        products.append(sides[0] @ torch.linalg.solve(normal, sides[1].T))
    slopes = torch.stack([one_minus_p("mlp", c) for c in range(3)]).mean(0)
    expected = torch.stack(products).mean(0) * slopes
    assert_close(trak.influence(CASES["mlp"].test), expected, CLOSE)
    assert list(trak.influence_by_layer(CASES["mlp"].test)) == ["head"]


# Questions.


@every_case
def test_questions_about_the_same_scores(name: str) -> None:
    case = CASES[name]
    trak = make(name)
    expected = formula(trak, name, "auto")
    for proponents in (True, False):
        best = trak.influence(case.test, k=3, proponents=proponents)
        indices, values = oracles.top_k(expected, 3, proponents)
        assert torch.equal(best.indices, indices)
        assert_close(best.influence_scores, values, CLOSE)
    whole = trak.influence(case.test, aggregate=True)
    assert_close(whole, expected.sum(0, keepdim=True), CLOSE)
    found = sum(trak.influence_by_layer(case.test, aggregate=True).values())
    assert_close(found, whole, CLOSE)


@every_case
@pytest.mark.parametrize("of_test", [True, False])
def test_self_influence(name: str, of_test: bool) -> None:
    """Of other examples, too: with the features of the training set, and their own 1 - p."""
    case = CASES[name]
    trak = make(name)
    products, slopes = [], []
    for c in range(3):
        p = matrix(trak, name, c)
        phi, own = gradients(name, c, False) @ p, gradients(name, c, of_test) @ p
        normal = phi.T @ phi + automatic(phi, 3) * torch.eye(DIM, dtype=torch.float64)
        products.append((own * torch.linalg.solve(normal, own.T).T).sum(1))
        slopes.append(one_minus_p(name, c, of_test))
    expected = torch.stack(products).mean(0) * torch.stack(slopes).mean(0)
    inputs: Any = case.test if of_test else None
    assert_close(trak.self_influence(inputs), expected, CLOSE)
    assert_close(trak.self_influence(inputs, outer_loop_by_checkpoints=True), expected, CLOSE)
    if of_test:
        loader = DataLoader(Examples(case.test), batch_size=3)
        assert_close(trak.self_influence(loader), expected, CLOSE)


@every_case
def test_quantities_serve_any_object_of_the_same_data(name: str) -> None:
    """Also one that has measured nothing yet."""
    case = CASES[name]
    trak = make(name)
    expected = formula(trak, name, "auto")
    quantities = trak.compute_intermediate_quantities(case.test)
    assert quantities.shape == (case.m, 3 * DIM)
    for other in (trak, make(name)):
        assert_close(other.influence(quantities), expected, CLOSE)
    best = make(name).influence(quantities, k=2)
    assert torch.equal(best.indices, oracles.top_k(expected, 2, True)[0])
    by_layer = make(name).influence_by_layer(quantities)
    assert_close(sum(by_layer.values()), expected, CLOSE)
    summed = trak.compute_intermediate_quantities(case.test, aggregate=True)
    assert_close(make(name).influence(summed), expected.sum(0, keepdim=True), CLOSE)


def test_quantities_of_another_shape() -> None:
    with pytest.raises(
        InvalidArgumentError, match=r"have shape \[m, 21\] here \(3 checkpoints x 7"
    ):
        make().influence(torch.zeros(2, 20, dtype=torch.float64))


# What is computed once.


@contextmanager
def counted(model: nn.Module) -> Iterator[list[int]]:
    passes: list[int] = []
    handle = model.register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    try:
        yield passes
    finally:
        handle.remove()


@pytest.mark.parametrize("place", ["memory", "store"])
def test_features_are_computed_once(place: str, tmp_path: Path) -> None:
    case = CASES["mlp"]
    model = case.model()
    own = {"store": tmp_path / "store"} if place == "store" else {}
    trak = make(model=model, verify="once", **own)
    trak.influence(case.test)
    with counted(model) as passes:
        for ridge in (1e-3, "auto", 5.0, 0):
            trak.ridge = ridge
            assert_close(trak.influence(case.test), formula(trak, "mlp", ridge), 1e-6)
        # each time examples that show that the model is the same, one to see what it takes, and the
        # test examples at each checkpoint
        assert passes == [4, 4, 1, case.m, case.m, case.m] * 4
        passes.clear()
        trak.self_influence()
        assert passes == [4, 4]


@every_case
def test_kept_in_memory_or_not(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    kept = make(name)
    monkeypatch.setattr("influence_kit.methods.gradient_cache.resident_bytes", lambda device: 0)
    anew = make(name)
    expected = formula(kept, name, "auto")
    assert_close(anew.influence(case.test), expected, CLOSE)
    assert anew._cache.rows is None
    assert_close(anew.self_influence(), kept.self_influence(), 1e-10)
    assert_close(sum(anew.influence_by_layer(case.test).values()), expected, CLOSE)


@every_kind
def test_saved_and_loaded(projection: str, tmp_path: Path) -> None:
    trak = make(projection=projection)
    expected = trak.influence(CASES["mlp"].test)
    trak.save(tmp_path)
    loaded = make(projection=projection).load(tmp_path)
    assert_close(loaded.influence(CASES["mlp"].test), expected, 1e-10)
    assert_close(loaded.self_influence(), trak.self_influence(), 1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_saved_with_outputs_of_any_kind(name: str, tmp_path: Path) -> None:
    trak = make(name)
    trak.save(tmp_path)
    expected = trak.influence(CASES[name].test)
    assert_close(make(name).load(tmp_path).influence(CASES[name].test), expected, 1e-10)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"projection": "gaussian"}, 'projection: "sjlt" there, "gaussian" here'),
        ({"projection_dim": 6}, "projection_dim: 7 there, 6 here"),
        ({"seed": 1}, "seed: 0 there, 1 here"),
        (
            {"output_fn": lambda o, t: o[:, 0], "loss_fn": nn.CrossEntropyLoss()},
            "losses of some examples",
        ),
    ],
)
def test_what_was_saved_with_other_settings_is_refused(
    changed: dict[str, Any], match: str, tmp_path: Path
) -> None:
    make().save(tmp_path)
    with pytest.raises(InvalidArgumentError, match=f"was saved for something else: .*{match}"):
        make(**changed).load(tmp_path)


# A ridge, or too few examples.


@pytest.mark.parametrize("n", [5, 6, 7, 8, 11])
def test_a_warning_where_features_are_more_than_examples(n: int) -> None:
    data = TensorDataset(*(t[:n] for t in CASES["mlp"].train))
    match = f"{n} training examples have features of 7 entries: Phi.T Phi is singular"
    expected = pytest.warns(UserWarning, match=match) if n < 7 else _no_warning()
    with expected:
        make(data=data, ridge=1.0).influence(CASES["mlp"].test)


@contextmanager
def _no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize(("projection", "k"), [("sjlt", 20), ("gaussian", 20), ("identity", 83)])
def test_without_a_ridge_too_few_examples_are_refused(projection: str, k: int) -> None:
    trak = make(projection=projection, projection_dim=20, ridge=0)
    match = (
        rf"Phi\^T Phi of the training set is singular: its {k} eigenvalues .*, and ridge 0 does "
        r"not make it positive definite\. Use a ridge above \S+$"
    )
    with pytest.raises(CurvatureError, match=match):
        trak.influence(CASES["mlp"].test)


def test_without_a_ridge_it_is_least_squares() -> None:
    """Phi^T Phi of more examples than features: what the score predicts is a projection."""
    trak = make(projection_dim=4, ridge=0.0)
    assert_close(trak.influence(CASES["mlp"].test), formula(trak, "mlp", 0.0), CLOSE)
    fitted = make(projection_dim=4, ridge=0.0, checkpoints=CASES["mlp"].checkpoints()[:1])
    hat = fitted.influence(CASES["mlp"].train) / one_minus_p("mlp", 0)
    assert_close(hat @ hat, hat, CLOSE)
    assert hat.trace().item() == pytest.approx(4, rel=1e-9)


@pytest.mark.parametrize(
    ("ridge", "match"),
    [
        (-1.0, "`ridge` must be a number that is not negative; got -1"),
        (float("nan"), "`ridge` must be a number that is not negative; got nan"),
        (float("inf"), "`ridge` must be a number that is not negative; got inf"),
        (True, "`ridge` must be a number that is not negative; got True"),
        (None, "`ridge` must be a number that is not negative; got None"),
        ("big", r"`ridge` must be a number, .* or one of \"auto\", .*; got 'big'"),
    ],
)
def test_a_ridge_that_cannot_be_meant(ridge: Any, match: str) -> None:
    with pytest.raises(InvalidArgumentError, match=match):
        make(ridge=ridge)
    trak = make()
    with pytest.raises(InvalidArgumentError, match=match):
        trak.ridge = ridge
    assert trak.ridge == "auto"


def test_an_automatic_ridge_of_features_that_are_zero() -> None:
    class Constant(TanhMLP):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(0 * x) * 0

    model = Constant().double()
    trak = make(model=model, checkpoints=[model.state_dict()])
    match = (
        r'ridge="auto" is a share of the mean eigenvalue of Phi\^T Phi, which is 0: the features '
        "of all 11 training examples are zero"
    )
    with pytest.raises(InvalidArgumentError, match=match):
        trak.influence(CASES["mlp"].test)


# Probabilities that round.


class Logits(nn.Module):
    """Logits that are the input times a weight: as far apart as they are made."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.scale = nn.Linear(classes, classes, bias=False)
        with torch.no_grad():
            self.scale.weight.copy_(torch.eye(classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [1.0, 30.0, 200.0])
@pytest.mark.parametrize("ahead", [True, False])
def test_logits_far_apart(dtype: torch.dtype, gap: float, ahead: bool) -> None:
    """Features are those of the margin's slope in the logits, and none is NaN."""
    torch.manual_seed(0)
    x = torch.randn(8, 3, dtype=dtype)
    y = torch.arange(8) % 3
    x[torch.arange(8), y] += gap if ahead else -gap
    model = Logits(3).to(dtype)
    data, test = TensorDataset(x, y), (x[:3], y[:3])
    trak = make(model=model, data=data, checkpoints=[model.state_dict()], projection="identity")
    trak.ridge = 1.0
    found = trak.influence(test)
    # the gradient in the weight is slope x^T: by hand, in float64
    wide = x.double()
    others = wide.clone()
    others[torch.arange(8), y] = -torch.inf
    slope = -others.softmax(1)
    slope[torch.arange(8), y] = 1
    phi = (slope.unsqueeze(2) * wide.unsqueeze(1)).flatten(1)
    margins = wide[torch.arange(8), y] - others.logsumexp(1)
    solved = torch.linalg.solve(phi.T @ phi + torch.eye(9).double(), phi.T)
    # what is left of 1 - p in float32 at 200 is 1e-87, which is 0
    wrong = torch.sigmoid(-margins.to(dtype)).double()
    expected = phi[:3] @ solved * wrong
    assert bool(torch.isfinite(found).all())
    scale = expected.abs().max()
    assert (found.double() - expected).abs().max() <= (
        1e-3 if dtype == torch.float32 else 1e-9
    ) * scale


def test_positions_that_are_ignored() -> None:
    """Neither their margin nor their 1 - p counts, in either layout of the logits."""

    class Sequences(nn.Module):
        def __init__(self, classes_first: bool) -> None:
            super().__init__()
            self.table = nn.Embedding(7, 5)
            self.classes_first = classes_first

        def forward(self, ids: Tensor) -> Tensor:
            logits = self.table(ids)
            return logits.movedim(2, 1) if self.classes_first else logits

    torch.manual_seed(0)
    ids, labels = torch.randint(0, 7, (10, 4)), torch.randint(0, 5, (10, 4))
    labels[0, 1:], labels[3], labels[5, 2] = -100, -100, -1
    weights = {"table.weight": torch.randn(7, 5, dtype=torch.float64)}
    phi, wrong = torch.zeros(10, 7, 5, dtype=torch.float64), torch.zeros(10, dtype=torch.float64)
    for i in range(10):
        counted = [t for t in range(4) if labels[i, t] >= 0]
        for t in counted:
            logits, y = weights["table.weight"][ids[i, t]].clone(), int(labels[i, t])
            p = logits.softmax(0)
            wrong[i] += (1 - p[y]) / len(counted)
            slope = -p / (1 - p[y])
            slope[y] = 1
            phi[i, ids[i, t]] += slope
    phi = phi.flatten(1)
    expected = phi @ torch.linalg.solve(phi.T @ phi + 0.1 * torch.eye(35).double(), phi.T) * wrong
    for classes_first in (False, True):
        model = Sequences(classes_first).double()
        data = TensorDataset(ids, labels)
        own = {"model": model, "data": data, "checkpoints": [{"state_dict": weights}]}
        trak = make(projection="identity", ridge=0.1, **own)
        assert_close(trak.influence((ids, labels)), expected, CLOSE)
        assert not trak.influence((ids, labels))[:, 3].any(), "no label counts"


def test_a_training_example_that_is_not_finite() -> None:
    x, y = CASES["mlp"].train
    x = x.clone()
    x[6, 1] = torch.nan
    match = "training example 6 has features that are NaN or infinite at checkpoint 0; look at that"
    with pytest.raises(NonFiniteError, match=match):
        make(data=TensorDataset(x, y)).influence(CASES["mlp"].test)


def test_a_slope_that_is_not_finite() -> None:
    """Where the loss's slope is infinite, and the output function knows nothing of it."""
    model, data, test = regression()

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs[:, 0] - targets).abs().sqrt()

    x, y = data.tensors
    y[4] = model(x)[4, 0].detach()
    own = {"model": model, "data": data, "checkpoints": [model.state_dict()], "batch_size": 3}
    trak = make(loss_fn=loss, output_fn=prediction, **own)
    with pytest.raises(NonFiniteError, match="training example 4 has a slope that is NaN or inf"):
        trak.influence(test)


def test_features_whose_products_overflow() -> None:
    x, y = 1e25 * torch.randn(8, 3), torch.arange(8) % 3
    model, data = Logits(3), TensorDataset(x, y)
    own = {"model": model, "data": data, "checkpoints": [model.state_dict()]}
    trak = make(projection="identity", **own)
    match = r"Phi\^T Phi is NaN or infinite at checkpoint 0, .* products overflow \(use float64\)"
    with pytest.raises(NonFiniteError, match=match):
        trak.influence((x, y))


# Other outputs than the margin.


def regression() -> tuple[nn.Module, TensorDataset, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x, y = torch.randn(13, 3, dtype=torch.float64), torch.randn(13, dtype=torch.float64)
    return model, TensorDataset(x[:10], y[:10]), (x[10:], y[10:])


def prediction(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs[:, 0]


def squared(reduction: str) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda outputs, targets: F.mse_loss(outputs[:, 0], targets, reduction=reduction)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("batch_size", [1, 3, 10])
def test_regression(reduction: str, batch_size: int) -> None:
    """Features of the prediction f, and 2 (y - f) in the place of 1 - p: whatever the reduction."""
    model, data, (x, y) = regression()
    own = {"model": model, "data": data, "checkpoints": [model.state_dict()]}
    own |= {"loss_fn": squared(reduction), "output_fn": prediction, "batch_size": batch_size}
    trak = make(projection="identity", ridge=0.05, **own)
    outputs = lambda o, t: o[:, 0]  # noqa: E731
    phi, tests = (oracles.gradients(model, batch, outputs) for batch in (data.tensors, (x, y)))
    normal = phi.T @ phi + 0.05 * torch.eye(phi.shape[1]).double()
    slopes = 2 * (data.tensors[1] - model(data.tensors[0])[:, 0].detach())
    expected = tests @ torch.linalg.solve(normal, phi.T) * slopes
    assert_close(trak.influence((x, y)), expected, CLOSE)
    test_slopes = 2 * (y - model(x)[:, 0].detach())
    own_scores = (tests * torch.linalg.solve(normal, tests.T).T).sum(1) * test_slopes
    assert_close(trak.self_influence((x, y)), own_scores, CLOSE)


@pytest.mark.parametrize("own", [False, True])
def test_another_output_of_test_examples(own: bool) -> None:
    """Its gradients take the place of phi_test; all of training examples stays."""
    case = CASES["mlp"]
    of_training = {"output_fn": lambda o, t: -case.loss(o, t), "loss_fn": case.loss} if own else {}
    phi, slopes = [], []
    for place in range(3):
        if own:
            train = oracles.gradients(model_at("mlp", place), case.train, case.loss)
            phi.append(-train)
            slopes.append(torch.ones(case.n).double())  # -dL/df of f = -L
        else:
            phi.append(gradients("mlp", place, False))
            slopes.append(one_minus_p("mlp", place))
    asked = lambda o, t: o[:, 0].square() - o[:, 1]  # noqa: E731
    products = []
    for place, train in enumerate(phi):
        tests = oracles.gradients(model_at("mlp", place), case.test, asked)
        normal = train.T @ train + 0.1 * torch.eye(train.shape[1]).double()
        products.append(tests @ torch.linalg.solve(normal, train.T))
    expected = torch.stack(products).mean(0) * torch.stack(slopes).mean(0)
    arguments = {"projection": "identity", "ridge": 0.1, **of_training}
    for output in (asked, lambda o, t: asked(o, t).sum(), lambda o, t: asked(o, t).mean()):
        trak = make(**arguments, test_output_fn=output)
        assert_close(trak.influence(case.test), expected, CLOSE)
    assert_close(sum(trak.influence_by_layer(case.test).values()), expected, CLOSE)
    quantities = trak.compute_intermediate_quantities(case.test)
    assert_close(trak.influence(quantities), expected, CLOSE)
    plain = make(**arguments)
    assert_close(trak.self_influence(), plain.self_influence(), CLOSE)
    assert plain.explains_output  # the margin


def test_leaving_an_example_out_lowers_the_prediction_by_the_score() -> None:
    """Ridge regression: exact but for the leverage, 1 / (1 - h), which is the closed form."""
    torch.manual_seed(1)
    x, noise = torch.randn(30, 4, dtype=torch.float64), torch.randn(30, dtype=torch.float64)
    y = x @ torch.ones(4).double() + noise
    ridge = 0.5
    normal = x.T @ x + ridge * torch.eye(4).double()
    model = nn.Linear(4, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.linalg.solve(normal, x.T @ y)[None])
    test = torch.randn(3, 4, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    # half the squared error: its slope is y - f
    half = lambda o, t: 0.5 * (o[:, 0] - t) ** 2  # noqa: E731
    own = {"model": model, "data": TensorDataset(x, y), "checkpoints": [model.state_dict()]}
    trak = make(projection="identity", ridge=ridge, loss_fn=half, output_fn=prediction, **own)
    found = trak.influence(test)
    leverage = (x * torch.linalg.solve(normal, x.T).T).sum(1)
    whole = test[0] @ model.weight[0].detach()
    for i in range(30):
        rest = [j for j in range(30) if j != i]
        without = x[rest].T @ x[rest] + ridge * torch.eye(4).double()
        left = test[0] @ torch.linalg.solve(without, x[rest].T @ y[rest])
        assert torch.allclose(whole - left, found[:, i] / (1 - leverage[i]), rtol=1e-8)


def test_an_output_of_dicts() -> None:
    case = CASES["dict"]
    expected = make("dict").influence(case.test)

    def own_margin(outputs: Any, batch: Any) -> Tensor:
        logits, labels = outputs["logits"], batch["labels"]
        p = logits.softmax(1).gather(1, labels[:, None])[:, 0]
        return p.log() - (1 - p).log()

    found = make("dict", output_fn=own_margin, loss_fn=case.loss).influence(case.test)
    # the slope of cross-entropy along the margin is 1 - p
    assert_close(found, expected, CLOSE)


# Mistakes.


@pytest.mark.parametrize("value", ["orthogonal", "mask", "normal", None])
def test_a_projection_that_there_is_not(value: Any) -> None:
    with pytest.raises(
        InvalidArgumentError, match=f"`projection` must be one of .*; got {value!r}"
    ):
        make(projection=value)


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (2.0, "must be a positive int; got 2.0"),
        (True, "must be a positive int; got True"),
        ((2, 3), r"must be a positive int; got \(2, 3\)"),
        (None, "must be a positive int; got None"),
        (0, "must be a positive int; got 0"),
        (-4, "must be a positive int; got -4"),
    ],
)
def test_a_projection_dim_that_cannot_be_meant(value: Any, match: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"`projection_dim` {match}"):
        make(projection_dim=value)


def test_an_output_without_a_loss() -> None:
    with pytest.raises(InvalidArgumentError, match="`output_fn` requires `loss_fn`"):
        make(output_fn=prediction)


def test_targets_that_are_no_labels(unchanged: Any) -> None:
    model, data, test = regression()
    trak = make(model=model, data=data, checkpoints=[model.state_dict()])
    match = "the targets are torch.float64, not class labels.* pass `output_fn"
    with unchanged(model), pytest.raises(InvalidArgumentError, match=match):
        trak.influence(test)


@pytest.mark.parametrize(
    ("output_fn", "match"),
    [
        (lambda o, t: o[:, 0].mean(), "`output_fn` was declared to return one loss per example"),
        (lambda o, t: o[:2, 0], r"`output_fn` returned a tensor of shape \[2\] for"),
        (lambda o, t: 3.0, "`output_fn` must return a tensor; got a float"),
    ],
)
def test_an_output_that_is_not_one_value_an_example(output_fn: Any, match: str) -> None:
    model, data, test = regression()
    own = {"model": model, "data": data, "checkpoints": [model.state_dict()]}
    trak = make(output_fn=output_fn, loss_fn=squared("none"), **own)
    with pytest.raises(InvalidArgumentError, match=match):
        trak.influence(test)


def test_weights_that_change_after_the_fit() -> None:
    case = CASES["mlp"]
    states = [{key: value.clone() for key, value in case.states[0].items()}]
    trak = make(checkpoints=states)
    trak.influence(case.test)
    states[0]["head.weight"].mul_(1.5)
    match = r"checkpoint 0 holds other weights than when Phi\^T Phi was measured; call `fit\(\)`"
    with pytest.raises(InvalidArgumentError, match=match):
        trak.influence(case.test)
    anew = make(checkpoints=states).influence(case.test)
    assert_close(trak.fit().influence(case.test), anew, 1e-10)


def test_a_training_set_without_examples() -> None:
    x, y = CASES["mlp"].train
    with pytest.raises(InvalidArgumentError, match="no examples: the training set is empty"):
        make(data=TensorDataset(x[:0], y[:0])).influence(CASES["mlp"].test)


def test_progress_speaks_of_what_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    make().fit(show_progress=True)
    assert r"Using TRAK to fit Phi^T Phi. Processing checkpoint" in capsys.readouterr().err


def test_negative_eigenvalues_of_features_are_rounding() -> None:
    block = torch.diag(torch.tensor([3.0, -1e-6]))
    match = (
        r"Phi\^T Phi of the training set has 1 negative .* Use a ridge above .* model in float64"
    )
    with pytest.raises(CurvatureError, match=match):
        inverse_of(block, torch.zeros(()))


class OwnLoss(nn.Module):
    """A causal language model as others write them: it shifts the labels in a loss of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.tokens(input_ids).cumsum(1))
        losses = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:])
        return {"loss": losses, "logits": logits}


def test_labels_of_a_causal_language_model_are_shifted_when_told() -> None:
    torch.manual_seed(0)
    model, ids = OwnLoss().double(), torch.randint(0, 7, (9, 5))
    train, test = [{"input_ids": row, "labels": row} for row in ids], ids[:3]
    batch = {"input_ids": test, "labels": test}

    def made(data: Any = train, **arguments: Any) -> TRAK:
        state = [model.state_dict()]
        return TRAK(model, data, state, projection="identity", ridge=0.1, **arguments)

    with pytest.raises(InvalidArgumentError, match="pass shift=1 for a causal language model"):
        made().influence(batch)

    class Plain(OwnLoss):
        def forward(self, input_ids: Tensor) -> Tensor:
            return self.head(self.tokens(input_ids).cumsum(1))[:, :-1]

    plain = Plain().double()
    plain.load_state_dict(model.state_dict())
    pairs = [(row, row[1:]) for row in ids]
    expected = TRAK(plain, pairs, [plain.state_dict()], projection="identity", ridge=0.1)
    found = made(shift=1).influence(batch)
    assert_close(found, expected.influence((test, test[:, 1:])), 1e-9)
    assert not torch.allclose(found, made(shift=0).influence(batch))


@pytest.mark.parametrize("shift", [2, -1, True])
def test_a_shift_that_is_none(shift: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="`shift` must be None, 0 or 1; got"):
        TRAK(nn.Linear(2, 2), [], [], shift=shift)


def test_a_store_of_slopes_of_another_loss_is_refused(tmp_path: Path) -> None:
    x, y = torch.randn(9, 3).double(), torch.randn(9, 1).double()
    model, train = nn.Linear(3, 1).double(), TensorDataset(x, y)

    def made(loss_fn: Any) -> TRAK:
        return TRAK(
            model,
            train,
            [model.state_dict()],
            loss_fn=loss_fn,
            output_fn=lambda outputs, targets: outputs[:, 0],
            projection="identity",
            store=tmp_path / "store",
        )

    made(nn.MSELoss()).influence((x, y))
    with pytest.raises(InvalidArgumentError, match="losses of some examples"):
        made(nn.L1Loss()).influence((x, y))
