"""Influence functions against dense matrices: curvature x solver x blocks, and their arguments.

A damping that is large against the curvature hides it: where not said otherwise, tests damp by the
median eigenvalue.
"""

import copy
from collections.abc import Mapping
from functools import cache
from typing import Any

import influence_oracles as dense
import oracles
import pytest
import slope_oracle
import torch
from cases import CASES, Examples, TanhMLP, cross_entropy, reduced
from contract import assert_close
from influence_oracles import LayerRecord
from torch import Tensor, nn
from torch.autograd.functional import jacobian
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from turns import in_turn

import influence_kit

NAMES = ["mlp", "cnn", "gpt"]
EXACT = ["hessian", "ggn", "empirical_fisher"]  # the Fisher is sampled
BLOCKS: dict[str, Any] = {
    "mlp": {"first": ["body.0.weight", "body.0.bias"], "last": ["head.bias", "head.weight"]},
    "cnn": {"one": ["0.weight", "3.bias"], "two": ["6.weight"]},
    "gpt": {"tied": ["tokens.weight", "out.weight"], "norm": ["norm.weight", "norm.bias"]},
}
KINDS_OF_BLOCKS = ["full", "layer", "parameter", "some"]

SOLVERS: dict[str, dict[str, Any]] = {
    "ExplicitInfluenceFunction": {},
    "CGInfluenceFunction": {"tol": 1e-10, "max_iter": 2000},
    # a step is a pass
    "LiSSAInfluenceFunction": {
        "recursion_depth": 160,
        "hessian_batch_size": None,
        "batch_size": 11,
    },
    "NystromInfluenceFunction": {"rank": 400},
}
ITERATIVE = ["CGInfluenceFunction", "LiSSAInfluenceFunction"]
# many products with a curvature are quick where they are products with kept gradients
USUAL = {solver: "empirical_fisher" if solver in ITERATIVE else "ggn" for solver in SOLVERS}
KRONECKER = {
    "KFACInfluenceFunction": dense.kfac_matrix,
    "EKFACInfluenceFunction": dense.ekfac_matrix,
}
# those layers of a model that have a Kronecker form
KRONECKER_LAYERS: dict[str, list[str]] = {
    "mlp": ["body.0", "body.2", "head"],
    "cnn": ["0", "3", "6"],
    "gpt": ["positions", "qkv", "out"],
}
ALL = [*SOLVERS, "DataInf", *KRONECKER]

every_case = pytest.mark.parametrize("name", NAMES)
every_curvature = pytest.mark.parametrize("curvature", EXACT)
every_kind_of_blocks = pytest.mark.parametrize("blocks", KINDS_OF_BLOCKS)
every_solver = pytest.mark.parametrize("solver", SOLVERS)
every_method = pytest.mark.parametrize("method", ALL)
# what does not depend on how a system is solved
QUICK = [m for m in ALL if m not in ITERATIVE]
every_quick_method = pytest.mark.parametrize("method", QUICK)
both_kronecker = pytest.mark.parametrize("method", KRONECKER)
both_relative = pytest.mark.parametrize("relative", ["l", "theta"])


# What the oracles know of a case at a checkpoint.


@cache
def model_at(name: str, place: int = 0) -> nn.Module:
    model = CASES[name].model()
    model.load_state_dict(CASES[name].states[place])
    return model


@cache
def train_gradients(name: str, place: int = 0) -> Tensor:
    return oracles.gradients(model_at(name, place), CASES[name].train, CASES[name].loss)


@cache
def query_gradients(name: str, place: int = 0) -> Tensor:
    return oracles.gradients(model_at(name, place), CASES[name].test, CASES[name].loss)


@cache
def curvature_of(name: str, kind: str, place: int = 0) -> Tensor:
    case = CASES[name]
    return dense.CURVATURES[kind](model_at(name, place), case.train, case.loss)


def named_blocks(name: str, kind: str, layers: list[str] | None = None) -> dense.Blocks:
    chosen = None if layers is None else _names_in(name, layers)
    return dense.blocks_of(model_at(name), BLOCKS[name] if kind == "some" else kind, chosen)


def _names_in(name: str, layers: list[str]) -> list[str]:
    names = [n for n, _ in model_at(name).named_parameters()]
    return [n for n in names if n.rpartition(".")[0] in layers]


def damping_for(solver: str, curvature: Tensor) -> float:
    """The median eigenvalue; for LiSSA, which would take long to converge, at least 1/6 of the top.

    A plain dot product is far from the scores at either, as a test below shows.
    """
    values = dense.eigenvalues(curvature)
    if solver != "LiSSAInfluenceFunction":
        return dense.telling_damping(curvature)
    return max(
        dense.telling_damping(curvature), values.max().item() / 6 - min(0.0, values.min().item())
    )


@cache
def solved(
    name: str, kind: str, blocks: str, damping: float, layers: tuple[str, ...] = (), place: int = 0
) -> Tensor:
    """M^-1 by dense inverses."""
    chosen = named_blocks(name, blocks, list(layers) or None)
    return dense.block_inverse(model_at(name), curvature_of(name, kind, place), chosen, damping)


def make(method: str, name: str, **changed: Any) -> Any:
    """A method on a case's first checkpoint; ``changed`` replaces any argument."""
    case = CASES[name]
    changed.setdefault("layers", KRONECKER_LAYERS[name] if method in KRONECKER else None)
    if method in KRONECKER or method in SOLVERS:
        changed.setdefault("curvature", USUAL.get(method, "empirical_fisher"))
    if changed.get("blocks") == "some":
        changed["blocks"] = BLOCKS[name]
    data = changed.pop("data", None) or Examples(case.train)
    checkpoints = changed.pop("checkpoints", None) or case.states[:1]
    model = changed.pop("model", None) or case.model()
    arguments = {"loss_fn": case.loss, "batch_size": 4, **SOLVERS.get(method, {})} | changed
    return getattr(influence_kit, method)(model, data, checkpoints, **arguments)


def inverse_for(method: str, name: str, damping: float, place: int = 0) -> Tensor:
    """M^-1 of any method with the arguments that ``make`` gives it."""
    if method in SOLVERS:
        return solved(name, USUAL[method], "full", damping, place=place)
    model = model_at(name, place)
    if method == "DataInf":
        blocks = named_blocks(name, "layer")
        dampings = dict.fromkeys(blocks, damping)
        return dense.datainf_inverse(model, train_gradients(name, place), blocks, dampings)
    blocks = named_blocks(name, "layer", KRONECKER_LAYERS[name])
    return dense.block_inverse(model, kronecker(method, name, place), blocks, damping)


@cache
def kronecker(method: str, name: str, place: int = 0) -> Tensor:
    case, model = CASES[name], model_at(name, place)
    return dense.kronecker_curvature(
        model, case.train, case.loss, KRONECKER_LAYERS[name], KRONECKER[method]
    )


def damping_of(method: str, name: str) -> float:
    """A telling damping of any method."""
    if method in KRONECKER:
        return dense.telling_damping(kronecker(method, name))
    if method == "DataInf":  # g g^T of one example has the eigenvalue norm(g)^2
        return train_gradients(name).square().sum(1).median().item() / 10
    return damping_for(method, curvature_of(name, USUAL[method]))


def tolerance(method: str) -> float:
    return 1e-6 if method in ITERATIVE else 1e-8


def check(method: str, name: str, influence: Any, inverse: Tensor) -> None:
    expected = dense.scores(inverse, query_gradients(name), train_gradients(name))
    assert_close(influence.influence(CASES[name].test), expected, tolerance(method))


# The oracles against each other, and against mathematics.


@every_case
def test_oracle_ggn_is_the_fisher_of_a_softmax(name: str) -> None:
    assert_close(curvature_of(name, "ggn"), curvature_of(name, "fisher"), 1e-12)


def test_oracle_hessian_is_the_ggn_of_a_linear_model() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    batch = CASES["mlp"].train
    expected = dense.full_hessian(model, batch, cross_entropy)
    assert_close(dense.gauss_newton(model, batch, cross_entropy), expected, 1e-12)


def test_oracle_hessian_is_the_slope_of_the_gradient() -> None:
    model, case = CASES["gpt"].model(), CASES["gpt"]
    direction = torch.randn_like(dense.flat(model))
    start, sides = dense.flat(model), []
    for step in (1e-5, -1e-5):
        nn.utils.vector_to_parameters(start + step * direction, model.parameters())
        sides.append(oracles.gradients(model, case.train, case.loss).mean(0))
    nn.utils.vector_to_parameters(start, model.parameters())
    product = dense.full_hessian(model, case.train, case.loss) @ direction
    assert_close((sides[0] - sides[1]) / 2e-5, product, 1e-8)


@every_case
def test_oracle_of_datainf_is_the_papers_formula(name: str) -> None:
    g, blocks = train_gradients(name), named_blocks(name, "layer")
    damping = dense.datainf_damping(model_at(name), g, blocks)
    expected = torch.zeros(g.shape[1], g.shape[1], dtype=g.dtype)
    for block, names in blocks.items():
        index, value = dense.places(model_at(name), names), damping[block]
        rows = g[:, index]
        shares = rows.T @ (rows / (value + rows.square().sum(1, keepdim=True)))
        expected[index[:, None], index] = (torch.eye(len(index)) - shares / len(g)) / value
    assert_close(dense.datainf_inverse(model_at(name), g, blocks, damping), expected, 1e-10)


def test_oracle_of_datainf_is_the_empirical_fisher_of_one_example() -> None:
    g, blocks = train_gradients("mlp")[:1], named_blocks("mlp", "layer")
    damping = dense.datainf_damping(model_at("mlp"), g, blocks)
    expected = dense.block_inverse(model_at("mlp"), g.T @ g, blocks, damping)
    assert_close(dense.datainf_inverse(model_at("mlp"), g, blocks, damping), expected)


@every_case
def test_oracle_of_layers_has_the_gradients_of_autograd(name: str) -> None:
    model, case = model_at(name), CASES[name]
    for layer in KRONECKER_LAYERS[name]:
        module = model.get_submodule(layer)
        seen = dense.record(model, module, case.train, case.loss)
        order = dense.parameter_order(module, seen.joined[0].shape)
        names = [f"{layer}.{own}" for own, _ in module.named_parameters()]
        found = torch.stack([joined.flatten()[order] for joined in seen.joined])
        assert_close(found, oracles.gradients(model, case.train, case.loss, names))


@both_kronecker
def test_oracle_of_kronecker_is_the_empirical_fisher_of_one_position(method: str) -> None:
    case, model = CASES["mlp"], model_at("mlp")
    one, layers = oracles.one(case.train, 3), KRONECKER_LAYERS["mlp"]
    found = dense.kronecker_curvature(model, one, case.loss, layers, KRONECKER[method])
    g = oracles.gradients(model, one, case.loss)
    blocks = dense.blocks_of(model, "layer").values()
    for index in (dense.places(model, names) for names in blocks):
        assert_close(found[index][:, index], g[:, index].T @ g[:, index])


@every_case
def test_oracle_of_ekfac_does_not_see_signs_and_is_nearer_than_kfac(name: str) -> None:
    model, case = model_at(name), CASES[name]
    for layer in KRONECKER_LAYERS[name]:
        seen = dense.record(model, model.get_submodule(layer), case.train, case.loss)
        rows = torch.stack([joined.flatten() for joined in seen.joined])
        exact = rows.T @ rows / len(rows)
        ekfac, kfac = dense.ekfac_matrix(seen), dense.kfac_matrix(seen)
        signs = torch.randint(2, (len(exact),)) * 2 - 1
        assert_close(dense.ekfac_matrix(seen, signs), ekfac, 1e-12)
        torch.testing.assert_close(ekfac.trace(), exact.trace())
        assert (ekfac - exact).norm() <= (kfac - exact).norm()


@every_method
@every_case
def test_dampings_of_these_tests_leave_the_curvature_its_say(method: str, name: str) -> None:
    damping = damping_of(method, name)
    h, g = query_gradients(name), train_gradients(name)
    inverse = inverse_for(method, name, damping)
    expected, plain = (
        dense.scores(inverse, h, g),
        h @ (inverse.diagonal() > 0).diag().double() @ g.T,
    )
    best = (expected * plain).sum() / plain.square().sum() * plain
    assert (expected - best).abs().max() > 0.1 * expected.abs().max()


# Curvature x solver x blocks.


@every_case
@every_curvature
@every_kind_of_blocks
def test_explicit(name: str, curvature: str, blocks: str) -> None:
    damping = dense.telling_damping(curvature_of(name, curvature))
    method = "ExplicitInfluenceFunction"
    influence = make(method, name, curvature=curvature, blocks=blocks, damping=damping)
    check(method, name, influence, solved(name, curvature, blocks, damping))


@in_turn(
    "curvature, where",
    EXACT,
    [*(("mlp", blocks) for blocks in KINDS_OF_BLOCKS), ("cnn", "layer"), ("gpt", "full")],
)
def test_cg(curvature: str, where: tuple[str, str]) -> None:
    name, blocks = where
    method = "CGInfluenceFunction"
    damping = damping_for(method, curvature_of(name, curvature))
    # an iteration is a pass
    arguments = {"batch_size": 4 if name == "mlp" else 11, "damping": damping}
    influence = make(method, name, curvature=curvature, blocks=blocks, **arguments)
    check(method, name, influence, solved(name, curvature, blocks, damping))


@pytest.mark.parametrize(
    ("name", "curvature", "blocks"),
    [
        ("mlp", "hessian", "full"),
        ("mlp", "empirical_fisher", "full"),
        ("mlp", "ggn", "layer"),
        ("gpt", "ggn", "full"),
    ],
)
def test_lissa(name: str, curvature: str, blocks: str) -> None:
    method = "LiSSAInfluenceFunction"
    damping = damping_for(method, curvature_of(name, curvature))
    influence = make(method, name, curvature=curvature, blocks=blocks, damping=damping)
    check(method, name, influence, solved(name, curvature, blocks, damping))


@in_turn("curvature, blocks, name", ["ggn", "empirical_fisher"], KINDS_OF_BLOCKS, NAMES)
def test_nystrom_of_full_rank(name: str, curvature: str, blocks: str) -> None:
    damping = dense.telling_damping(curvature_of(name, curvature))
    method = "NystromInfluenceFunction"
    influence = make(method, name, curvature=curvature, blocks=blocks, damping=damping)
    check(method, name, influence, solved(name, curvature, blocks, damping))


@every_case
def test_nystrom_of_the_curvatures_own_rank_is_exact(name: str) -> None:
    kind, rank = "empirical_fisher", CASES[name].n
    damping = dense.telling_damping(curvature_of(name, kind))
    influence = make(
        "NystromInfluenceFunction", name, curvature=kind, rank=rank + 2, damping=damping
    )
    check("NystromInfluenceFunction", name, influence, solved(name, kind, "full", damping))


# every size for every method, each on another model; LiSSA takes many passes over the data
BATCH_SIZES = [("LiSSAInfluenceFunction", "mlp", 7)] + [
    (method, name, (1, 7, 11)[(row + place) % 3])
    for row, method in enumerate(m for m in ALL if m != "LiSSAInfluenceFunction")
    for place, name in enumerate(NAMES)
]


@pytest.mark.parametrize(("method", "name", "size"), BATCH_SIZES)
def test_batch_sizes(method: str, name: str, size: int) -> None:
    damping = damping_of(method, name)
    influence = make(method, name, damping=damping, batch_size=size)
    check(method, name, influence, inverse_for(method, name, damping))


@pytest.mark.parametrize("preconditioner", [None, "sample", "jacobi", "nystrom", "kfac", "ekfac"])
@pytest.mark.parametrize("blocks", ["full", "layer"])
def test_preconditioners_of_cg_do_not_change_scores(preconditioner: str, blocks: str) -> None:
    method = "CGInfluenceFunction"
    damping = damping_for(method, curvature_of("mlp", "ggn"))
    arguments = {"preconditioner": preconditioner, "blocks": blocks, "damping": damping}
    arguments |= {"curvature": "ggn", "batch_size": 11}
    inverse = solved("mlp", "ggn", blocks, damping)
    check(method, "mlp", make(method, "mlp", **arguments), inverse)


def sampled_series(v: Tensor, g: Tensor, damping: float, arguments: Mapping[str, Any]) -> Tensor:
    """LiSSA with samples of the empirical Fisher drawn here: the mean of its repeats."""
    results = []
    for _ in range(arguments["num_repeat"]):
        h = v
        for _ in range(arguments["recursion_depth"]):
            some = g[torch.randint(len(g), (arguments["hessian_batch_size"],))]
            h = v + h - (h @ some.T @ some / len(some) + damping * h) / arguments["scale"]
        results.append(h / arguments["scale"])
    return torch.stack(results).mean(0)


def test_lissa_in_batches_is_right_on_average() -> None:
    name, damping = "mlp", 0.5
    arguments = {"hessian_batch_size": 4, "recursion_depth": 80, "num_repeat": 10, "scale": 4.0}
    influence = make("LiSSAInfluenceFunction", name, damping=damping, **arguments)
    h, g = query_gradients(name), train_gradients(name)
    drawn = torch.stack([sampled_series(h, g, damping, arguments) @ g.T for _ in range(60)])
    exact = dense.scores(solved(name, USUAL["LiSSAInfluenceFunction"], "full", damping), h, g)
    within_sampling(influence.influence(CASES[name].test), drawn, exact)


# Solvers and the right-hand sides.


@every_solver
@pytest.mark.parametrize("m", [1, 2, 23])
def test_one_two_and_more_tests_than_parameters(solver: str, m: int) -> None:
    case, layers = CASES["mlp"], ["head"]
    torch.manual_seed(30)
    test = case.batch(m)
    damping = damping_for(solver, curvature_of("mlp", USUAL[solver]))
    h = oracles.gradients(model_at("mlp"), test, case.loss)
    inverse = solved("mlp", USUAL[solver], "full", damping, tuple(layers))
    expected = dense.scores(inverse, h, train_gradients("mlp"))
    found = make(solver, "mlp", layers=layers, damping=damping).influence(test)
    assert_close(found, expected, tolerance(solver))


@every_solver
def test_every_row_is_as_close_whatever_its_size(solver: str) -> None:
    def by_class(outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(outputs, targets) * 1000.0 ** (targets - 1)

    case = CASES["mlp"]
    damping = damping_for(solver, curvature_of("mlp", USUAL[solver]))
    h = oracles.gradients(model_at("mlp"), case.test, by_class)
    inverse = solved("mlp", USUAL[solver], "full", damping)
    expected = dense.scores(inverse, h, train_gradients("mlp"))
    found = make(solver, "mlp", damping=damping, test_loss_fn=by_class).influence(case.test)
    for row, wanted in zip(found, expected, strict=True):
        assert_close(row, wanted, tolerance(solver))


@every_solver
@pytest.mark.parametrize("kept", [0, 1])
def test_a_test_example_without_a_gradient_scores_zero(solver: str, kept: int) -> None:
    def some(outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(outputs, targets) * (targets == 0) * kept

    case = CASES["mlp"]
    damping = damping_for(solver, curvature_of("mlp", USUAL[solver]))
    found = make(solver, "mlp", damping=damping, test_loss_fn=some).influence(case.test)
    zero = (case.test[1] != 0) | (kept == 0)
    assert (found[zero] == 0).all()
    inverse = solved("mlp", USUAL[solver], "full", damping)
    expected = dense.scores(inverse, query_gradients("mlp"), train_gradients("mlp"))
    if kept:
        assert_close(found[~zero], expected[~zero], tolerance(solver))


def test_least_squares_in_closed_form() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(13, 4, dtype=torch.float64), torch.randn(13, 1, dtype=torch.float64)
    model = nn.Linear(4, 1, bias=False).double()
    influence = influence_kit.ExplicitInfluenceFunction(
        model,
        TensorDataset(x, y),
        [model.state_dict()],
        loss_fn=lambda outputs, targets: (outputs - targets).square().sum(1) / 2,
        damping=0.3,
    )
    g = (model(x) - y).detach() * x
    expected = g[:5] @ torch.linalg.solve(x.T @ x / 13 + 0.3 * torch.eye(4, dtype=x.dtype), g.T)
    assert_close(influence.influence((x[:5], y[:5])), expected)


class Tagger(nn.Module):
    """Position by position, so that a padded one has no gradient anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.hidden = nn.Embedding(7, 4), nn.Linear(4, 5)
        self.head = nn.Linear(5, 3, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.hidden(self.tokens(ids)).tanh())


def padded_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.transpose(1, 2), targets, reduction="none", ignore_index=-100)


def sequences(n: int, padded: bool) -> tuple[Tensor, Tensor]:
    ids, tags = torch.randint(0, 7, (n, 6)), torch.randint(0, 3, (n, 6))
    lengths = torch.randint(2, 7, (n, 1))
    return ids, torch.where(torch.arange(6) < lengths, tags, -100) if padded else tags


# The Fisher of sampled slopes.


def sampled_slopes(logits: Tensor, repeats: int, generator: torch.Generator) -> Tensor:
    """Slopes ``[repeats, T, c]`` of an example with logits ``[T, c]``, of signs drawn here."""
    found = []
    for p in logits.double().softmax(-1):
        root = slope_oracle.root(p, slope_oracle.pivot_of(p))
        signs = torch.randint(2, (repeats, root.shape[1]), generator=generator) * 2.0 - 1
        found.append(signs.double() @ root.T)
    return torch.stack(found, dim=1)


def label_slopes(logits: Tensor, repeats: int, generator: torch.Generator) -> Tensor:
    """The same at labels drawn from the softmax."""
    p = logits.double().softmax(-1)
    labels = p.multinomial(repeats, True, generator=generator).T
    return p - F.one_hot(labels, p.shape[-1])


def fisher_of(name: str, sample: Any, repeats: int, seed: int) -> Tensor:
    """The Fisher of sampled slopes or labels, ``repeats`` for each example."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(CASES[name].n):
        jacobian_, logits = output_gradients(name, i)
        rows.append(sample(logits, repeats, generator).flatten(1) @ jacobian_)
    g = torch.cat(rows)
    return g.T @ g / len(g)


@cache
def output_gradients(name: str, i: int) -> tuple[Tensor, Tensor]:
    """The Jacobian ``[T * c, P]`` of an example's logits, and the logits ``[T, c]``."""
    model, example = model_at(name), oracles.one(CASES[name].train, i)
    found = jacobian(lambda v: dense.outputs_at(model, v, example), dense.flat(model))
    logits = oracles.forward(model, example).detach()
    return found.flatten(0, -2), logits.reshape(-1, logits.shape[-1])


def repeated(name: str, times: int) -> Examples:
    """The training set so many times over: each copy has its own samples."""
    return Examples(tuple(torch.cat([part] * times) for part in CASES[name].train))


def within_sampling(found: Tensor, drawn: Tensor, exact: Tensor) -> None:
    """Scores of a sample are where other draws ``[draws, m, n]`` are, around the exact ones."""
    mean, deviation = drawn.mean(0), drawn.std(0)
    assert deviation.max() < 0.1 * exact.abs().max(), "too few draws to tell"
    assert ((mean - exact).abs() < deviation + 1e-12).all()
    # one of 44 normal deviates is beyond 5 in 40 000 runs
    assert ((found - mean).abs() <= 5 * deviation + 1e-12).all()
    assert not torch.allclose(found, exact, rtol=1e-6), "not sampled at all"


def closer_than_labels(slopes: Tensor, labels: Tensor, share: float) -> None:
    """Scores ``[draws, m, n]`` of sampled slopes vary by a share of those of labels at most."""
    found, expected = (float(one.var(0).mean().sqrt()) for one in (slopes, labels))
    assert found < share * expected


@pytest.mark.parametrize("name", ["mlp", "gpt"])
def test_sampled_fisher_approaches_the_sum_over_all_labels(name: str) -> None:
    """Closer than that of sampled labels, or (mlp, whose classes are all as likely) as close."""
    times, exact = 60, curvature_of(name, "fisher")
    damping = dense.eigenvalues(exact).max().item() / 10
    h, g, blocks = query_gradients(name), train_gradients(name), named_blocks(name, "full")

    def scores(curvature: Tensor) -> Tensor:
        return dense.scores(dense.block_inverse(model_at(name), curvature, blocks, damping), h, g)

    slopes, labels = (
        torch.stack([scores(fisher_of(name, sample, times, seed)) for seed in range(60)])
        for sample in (sampled_slopes, label_slopes)
    )
    influence = make(
        "ExplicitInfluenceFunction",
        name,
        curvature="fisher",
        damping=damping,
        hessian_dataset=repeated(name, times),
        batch_size=64,
    )
    within_sampling(influence.influence(CASES[name].test), slopes, scores(exact))
    closer_than_labels(slopes, labels, 0.8 if name == "gpt" else 1.1)


@pytest.mark.parametrize(("confidence", "share"), [(12.0, 0.6), (40.0, 0.2)])
def test_slopes_of_a_confident_model_vary_far_less_than_labels(
    confidence: float, share: float
) -> None:
    """Errors of the package over seeds, against those of labels."""
    model, train, times = copy.deepcopy(model_at("mlp")), CASES["mlp"].train, 20
    with torch.no_grad():
        model.head.weight *= confidence
    exact = dense.fisher(model, train)
    damping = dense.eigenvalues(exact).max().item() / 10
    h, g = (oracles.gradients(model, side, cross_entropy) for side in (CASES["mlp"].test, train))
    logits, generator = model(train[0]).detach(), torch.Generator().manual_seed(0)
    jacobians = jacobian(lambda v: dense.outputs_at(model, v, train), dense.flat(model))

    def scores(curvature: Tensor) -> Tensor:
        return h @ torch.linalg.solve(curvature + damping * torch.eye(83).double(), g.T)

    def error(found: list[Tensor]) -> float:
        return float((torch.stack(found) - scores(exact)).square().mean().sqrt())

    def at_labels() -> Tensor:
        own = [label_slopes(z[None], times, generator)[:, 0] for z in logits]
        rows = torch.cat([s @ j for s, j in zip(own, jacobians, strict=True)])
        return scores(rows.T @ rows / len(rows))

    def at_slopes_of(seed: int) -> Tensor:
        own = {"loss_fn": cross_entropy, "curvature": "fisher", "damping": damping, "seed": seed}
        data = Examples(tuple(torch.cat([part] * times) for part in train))
        states = [model.state_dict()]
        influence = influence_kit.ExplicitInfluenceFunction(
            model, Examples(train), states, hessian_dataset=data, **own
        )
        return influence.influence(CASES["mlp"].test)

    found = error([at_slopes_of(seed) for seed in range(15)])
    assert found < share * error([at_labels() for _ in range(60)])


def bits(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 4, dtype=torch.float64), torch.randint(2, (n, 3)).double()


def numbers(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 4, dtype=torch.float64), torch.randn(n, 3, dtype=torch.float64)


def binary_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(outputs, targets, reduction="none")


def squared_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.7 * (outputs - targets).square()


def label_residual(loss: Any, outputs: Tensor, targets: Tensor, generator: Any) -> Tensor:
    """The loss's slope at the outputs, at labels that the likelihood draws."""
    if loss is binary_loss:
        return outputs.sigmoid() - torch.bernoulli(outputs.sigmoid(), generator=generator)
    if loss is squared_loss:
        # exp(-0.7 (y - output)^2) has the variance 1 / 1.4
        noise = torch.empty_like(outputs).normal_(generator=generator)
        return 1.4 * noise / 1.4**0.5
    p = outputs.softmax(-1)
    labels = p.flatten(0, -2).multinomial(1, generator=generator).view(targets.shape)
    return (p - F.one_hot(labels, p.shape[-1])) * (targets >= 0)[..., None]


def slope_residual(loss: Any, outputs: Tensor, targets: Tensor, generator: Any) -> Tensor:
    """Random signs times a root of the covariance of those."""
    signs = torch.randint(2, outputs.shape, generator=generator).double() * 2 - 1
    if loss is binary_loss:
        return signs * (outputs.sigmoid() * (1 - outputs.sigmoid())).sqrt()
    if loss is squared_loss:
        return signs * 1.4**0.5
    # the examples are copies of one
    found = sampled_slopes(outputs[0], len(outputs), generator)
    return found * (targets >= 0)[..., None]


@pytest.mark.parametrize(
    ("loss", "data", "build", "share"),
    [
        (binary_loss, bits, TanhMLP, 0.95),
        (squared_loss, numbers, TanhMLP, 0.9),
        (padded_loss, lambda n: sequences(n, padded=True), Tagger, 1.0),
    ],
    ids=["sigmoid", "normal", "padded softmax"],
)
def test_sampled_fisher_approaches_the_ggn(loss: Any, data: Any, build: Any, share: float) -> None:
    torch.manual_seed(0)
    model, train, test, times = build().double(), data(11), data(4), 60
    exact = dense.gauss_newton(model, train, loss)
    damping = dense.eigenvalues(exact).max().item() / 10
    h, g = (oracles.gradients(model, side, loss) for side in (test, train))
    examples = [oracles.one(train, i) for i in range(11)]
    slopes = [
        jacobian(lambda v, e=e: dense.outputs_at(model, v, e), dense.flat(model)).flatten(0, -2)
        for e in examples
    ]
    outputs = [oracles.forward(model, e).detach() for e in examples]
    generator = torch.Generator().manual_seed(0)

    def scores(curvature: Tensor) -> Tensor:
        return h @ torch.linalg.solve(curvature + damping * torch.eye(len(curvature)).double(), g.T)

    def sampled(residual: Any) -> Tensor:
        rows = [
            residual(
                loss, z.expand(times, *z.shape[1:]), y.expand(times, *y.shape[1:]), generator
            ).flatten(1)
            @ j
            for z, (_, y), j in zip(outputs, examples, slopes, strict=True)
        ]
        return torch.cat(rows).T @ torch.cat(rows) / len(torch.cat(rows))

    influence = influence_kit.ExplicitInfluenceFunction(
        model,
        Examples(train),
        [model.state_dict()],
        loss_fn=nn.BCEWithLogitsLoss(reduction="none") if loss is binary_loss else loss,
        batch_size=64,
        curvature="fisher",
        damping=damping,
        hessian_dataset=Examples(tuple(torch.cat([part] * times) for part in train)),
    )
    slopes, labels = (
        torch.stack([scores(sampled(residual)) for _ in range(60)])
        for residual in (slope_residual, label_residual)
    )
    within_sampling(influence.influence(test), slopes, scores(exact))
    closer_than_labels(slopes, labels, share)


def records_by_class(name: str) -> tuple[dict[str, list[LayerRecord]], Tensor]:
    """What each layer sees of unit slopes of each class, and the logits ``[n, c]``."""
    inputs, _ = CASES[name].train
    model = model_at(name)
    logits = model(inputs).detach()
    units = torch.eye(logits.shape[1], dtype=logits.dtype)
    batches = [(inputs, unit.expand(len(inputs), -1)) for unit in units]
    found = {
        layer: [
            dense.record(model, model.get_submodule(layer), batch, slope_oracle.products)
            for batch in batches
        ]
        for layer in KRONECKER_LAYERS[name]
    }
    return found, logits


def at_slopes(by_class: list[LayerRecord], slopes: Tensor) -> LayerRecord:
    """The record of examples with slopes ``[n, repeats, c]``, in which gradients are linear."""
    found = LayerRecord([], [], [], [])
    for i, own in enumerate(slopes):
        deltas = torch.stack([one.deltas[i] for one in by_class])
        joined = torch.stack([one.joined[i] for one in by_class])
        found.deltas += torch.einsum("rc,cto->rto", own, deltas)
        found.joined += torch.einsum("rc,coi->roi", own, joined)
        found.inputs += [by_class[0].inputs[i]] * len(own)
        found.counted += [by_class[0].counted[i] | True] * len(own)
    return found


@both_kronecker
def test_kronecker_of_sampled_slopes_approaches_the_sum_over_all(method: str) -> None:
    """Closer than that of sampled labels."""
    name, times = "mlp", 60
    by_class, logits = records_by_class(name)
    classes, model = logits.shape[1], model_at(name)
    generator = torch.Generator().manual_seed(0)

    def scores(slopes: Tensor) -> Tensor:
        inverse = torch.zeros(83, 83, dtype=torch.float64)
        for layer, records in by_class.items():
            matrix = KRONECKER[method](at_slopes(records, slopes))
            damped = matrix + 0.02 * torch.eye(len(matrix), dtype=matrix.dtype)
            order = dense.parameter_order(model.get_submodule(layer), records[0].joined[0].shape)
            index = dense.places(model, _names_in(name, [layer]))
            inverse[index[:, None], index] = torch.linalg.inv(damped)[order][:, order]
        return dense.scores(inverse, query_gradients(name), train_gradients(name))

    def drawn(sample: Any) -> Tensor:
        own = [sample(row[None], times, generator)[:, 0] for row in logits]
        return scores(torch.stack(own))

    p = logits.softmax(1)
    # the mean over c copies is the sum over all labels
    every = (p[:, None] - torch.eye(classes).double()) * (classes * p).sqrt()[:, :, None]
    influence = make(
        method,
        name,
        curvature="fisher",
        damping=0.02,
        hessian_dataset=repeated(name, times),
        batch_size=64,
    )
    slopes, labels = (
        torch.stack([drawn(sample) for _ in range(40)]) for sample in (sampled_slopes, label_slopes)
    )
    within_sampling(influence.influence(CASES[name].test), slopes, scores(every))
    closer_than_labels(slopes, labels, 0.9)


@pytest.mark.parametrize("method", ["ExplicitInfluenceFunction", *KRONECKER])
@pytest.mark.parametrize("name", ["mlp", "gpt"])
def test_sampled_slopes_depend_on_the_seed_alone(method: str, name: str) -> None:
    arguments = {"curvature": "fisher", "damping": damping_of(method, name)}
    test = CASES[name].test
    torch.manual_seed(0)
    first = make(method, name, **arguments).influence(test)
    torch.manual_seed(1)
    for size in (1, 7, 11):
        again = make(method, name, batch_size=size, **arguments).influence(test)
        assert_close(again, first, 1e-9)
    other = make(method, name, seed=1, **arguments).influence(test)
    assert (other - first).abs().max() > 1e-3 * first.abs().max()


@pytest.mark.parametrize("solver", ITERATIVE)
def test_solvers_sample_the_same_slopes(solver: str) -> None:
    arguments = {"curvature": "fisher", "damping": damping_of(solver, "mlp"), "seed": 5}
    expected = make("ExplicitInfluenceFunction", "mlp", **arguments).influence(CASES["mlp"].test)
    found = make(solver, "mlp", **arguments).influence(CASES["mlp"].test)
    assert_close(found, expected, 1e-6)


# DataInf, K-FAC and EK-FAC where a model has more than one kind of layer.


@every_case
@pytest.mark.parametrize("method", ["DataInf", *KRONECKER])
def test_layerwise_methods(method: str, name: str) -> None:
    damping = damping_of(method, name)
    check(method, name, make(method, name, damping=damping), inverse_for(method, name, damping))


@every_case
@pytest.mark.parametrize("kind", ["parameter", "some", "full"])
def test_datainf_by_other_blocks(kind: str, name: str) -> None:
    blocks = named_blocks(name, kind)
    gradients = dict(columns_of(name, train_gradients(name)))
    squares = {
        block: sum(gradients[one].square().sum(1) for one in names).mean()
        for block, names in blocks.items()
    }
    sizes = {
        block: sum(gradients[one].shape[1] for one in names) for block, names in blocks.items()
    }
    dampings = {block: 0.1 * float(squares[block]) / sizes[block] for block in blocks}
    inverse = dense.datainf_inverse(model_at(name), train_gradients(name), blocks, dampings)
    datainf = make("DataInf", name, blocks=kind)
    check("DataInf", name, datainf, inverse)
    assert datainf.damping_used[0] == pytest.approx(dampings)


def columns_of(name: str, rows: Tensor) -> list[tuple[str, Tensor]]:
    """The columns of each parameter of a case's model."""
    parameters = dict(model_at(name).named_parameters())
    columns = rows.split([p.numel() for p in parameters.values()], dim=1)
    return list(zip(parameters, columns, strict=True))


@both_kronecker
@pytest.mark.parametrize(
    ("layers", "padded"),
    [(["hidden", "head"], True), (["tokens", "head"], True), (["tokens", "hidden"], False)],
    ids=["padded", "padded embedding", "whole"],
)
@pytest.mark.parametrize("size", [1, 4])
def test_kronecker_of_sequences(method: str, layers: list[str], padded: bool, size: int) -> None:
    torch.manual_seed(0)
    model, train, test = Tagger().double(), sequences(11, padded), sequences(4, padded)
    curvature = dense.kronecker_curvature(model, train, padded_loss, layers, KRONECKER[method])
    damping = dense.telling_damping(curvature)
    names = [n for n, _ in model.named_parameters() if n.rpartition(".")[0] in layers]
    blocks = dense.blocks_of(model, "layer", names)
    inverse = dense.block_inverse(model, curvature, blocks, damping)
    h, g = (oracles.gradients(model, side, padded_loss) for side in (test, train))
    found = kronecker_scores(
        method,
        model,
        train,
        test,
        loss_fn=padded_loss,
        batch_size=size,
        layers=layers,
        damping=damping,
    )
    assert_close(found, dense.scores(inverse, h, g), 1e-8)


def kronecker_scores(
    method: str, model: nn.Module, train: Any, test: Any, **arguments: Any
) -> Tensor:
    arguments = {"loss_fn": cross_entropy, "batch_size": 4, "damping": 0.01} | arguments
    influence = getattr(influence_kit, method)(
        model, Examples(train), [model.state_dict()], curvature="empirical_fisher", **arguments
    )
    return influence.influence(test)


class Grouped(nn.Module):
    """A grouped convolution, or the same as one a group."""

    def __init__(self, apart: bool) -> None:
        super().__init__()
        settings = {"stride": 2, "padding": 1, "dilation": 2}
        self.whole = nn.Conv2d(4, 6, 3, groups=2, **settings)
        self.parts = nn.ModuleList(nn.Conv2d(2, 3, 3, **settings) for _ in range(2))
        for place, part in enumerate(self.parts):
            rows = slice(3 * place, 3 * place + 3)
            part.weight.data, part.bias.data = (
                self.whole.weight.data[rows],
                self.whole.bias.data[rows],
            )
        self.apart, self.head = apart, nn.Linear(6 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.apart:
            first, second = (part(x[:, 2 * i : 2 * i + 2]) for i, part in enumerate(self.parts))
            return self.head(torch.cat([first, second], dim=1).tanh().flatten(1))
        return self.head(self.whole(x).tanh().flatten(1))


@both_kronecker
def test_a_grouped_convolution_is_one_a_group(method: str) -> None:
    torch.manual_seed(0)
    model = Grouped(apart=False).double()
    train, test = ((torch.randn(n, 4, 6, 6).double(), torch.arange(n) % 3) for n in (11, 4))
    expected, found = (
        kronecker_scores(method, model, train, test, layers=layers)
        for model.apart, layers in ((True, ["parts.0", "parts.1"]), (False, ["whole"]))
    )
    assert_close(found, expected, 1e-8)


class Shared(nn.Module):
    """A layer that runs on two halves of the input, at once or one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head, self.at_once = nn.Linear(2, 5), nn.Linear(5, 3), True

    def forward(self, x: Tensor) -> Tensor:
        if self.at_once:
            return self.head(self.inner(x.view(-1, 2, 2)).tanh().sum(1))
        return self.head(self.inner(x[:, :2]).tanh() + self.inner(x[:, 2:]).tanh())


@both_kronecker
def test_a_layer_that_runs_twice_has_two_positions(method: str) -> None:
    torch.manual_seed(0)
    model, case = Shared().double(), CASES["mlp"]
    expected, found = (
        kronecker_scores(method, model, case.train, case.test) for model.at_once in (True, False)
    )
    assert_close(found, expected, 1e-8)


class Shifted(nn.Module):
    """A linear layer without a bias, and a constant."""

    def __init__(self, shift: Tensor) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 5, bias=False), nn.Linear(5, 3)
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.inner(x) + self.shift).tanh())


@both_kronecker
def test_a_frozen_bias_is_a_constant(method: str) -> None:
    torch.manual_seed(0)
    case = CASES["mlp"]
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    model[0].bias.requires_grad_(False)
    other = Shifted(model[0].bias.data).double()
    other.inner.weight.data = model[0].weight.data
    other.head.load_state_dict(model[2].state_dict())
    expected = kronecker_scores(method, other, case.train, case.test)
    assert_close(kronecker_scores(method, model, case.train, case.test), expected, 1e-8)


def test_a_cheaper_form_of_products_errs_less_than_rtol() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 5)).double()
    x = torch.randn(200, 64).double() * torch.logspace(0, -2, 64)
    train = (x, torch.randint(5, (200,)))
    arguments = {"layers": ["0"], "batch_size": 64}
    exact, found = (
        kronecker_scores("KFACInfluenceFunction", model, train, train, rtol=rtol, **arguments)
        for rtol in (0, 1e-5)
    )
    assert not torch.allclose(found, exact, 1e-10), "the cheaper form was not used"
    assert_close(found, exact, 1e-5)


# Arguments.


@every_method
def test_several_checkpoints_are_averaged(method: str) -> None:
    case, damping = CASES["mlp"], damping_of(method, "mlp")
    each = [
        dense.scores(
            inverse_for(method, "mlp", damping, place),
            query_gradients("mlp", place),
            train_gradients("mlp", place),
        )
        for place in range(3)
    ]
    # learning rates are not weights here
    influence = make(method, "mlp", damping=damping, checkpoints=case.checkpoints())
    expected = torch.stack(each).mean(0)
    assert_close(influence.influence(case.test), expected, tolerance(method))


@pytest.mark.parametrize("solver", [s for s in SOLVERS if s != "LiSSAInfluenceFunction"])
@every_kind_of_blocks
def test_a_damping_for_each_block(solver: str, blocks: str) -> None:
    names = named_blocks("mlp", blocks)
    start = damping_for(solver, curvature_of("mlp", USUAL[solver]))
    # the name of the one block of all is not given: a number serves
    damping = {block: start * (place + 1) for place, block in enumerate(names)}
    given = start if blocks == "full" else damping
    influence = make(solver, "mlp", blocks=blocks, damping=given)
    inverse = dense.block_inverse(
        model_at("mlp"), curvature_of("mlp", USUAL[solver]), names, damping
    )
    check(solver, "mlp", influence, inverse)
    (used,) = influence.damping_used
    assert list(used.values()) == list(damping.values())
    assert blocks == "full" or used == damping


@pytest.mark.parametrize("method", ["DataInf", *KRONECKER])
def test_a_damping_for_each_layer(method: str) -> None:
    start, layers = damping_of(method, "mlp"), KRONECKER_LAYERS["mlp"]
    damping = {layer: start * (place + 1) for place, layer in enumerate(layers)}
    influence = make(method, "mlp", damping=damping)
    model, blocks = model_at("mlp"), named_blocks("mlp", "layer")
    if method == "DataInf":
        inverse = dense.datainf_inverse(model, train_gradients("mlp"), blocks, damping)
    else:
        inverse = dense.block_inverse(model, kronecker(method, "mlp"), blocks, damping)
    check(method, "mlp", influence, inverse)
    assert influence.damping_used == [damping]


def close_dampings(found: Mapping[str, float], expected: Mapping[str, float]) -> None:
    assert list(found) == list(expected) or len(found) == 1
    for value, wanted in zip(found.values(), expected.values(), strict=True):
        assert value == pytest.approx(wanted, rel=1e-8)


@in_turn("curvature, blocks, name", ["ggn", "empirical_fisher"], KINDS_OF_BLOCKS, NAMES)
def test_automatic_damping(name: str, curvature: str, blocks: str) -> None:
    method, matrix = "ExplicitInfluenceFunction", curvature_of(name, curvature)
    names = named_blocks(name, blocks)
    expected = {
        block: dense.auto_damping(matrix, dense.places(model_at(name), own), 1.0, CASES[name].n)
        for block, own in names.items()
    }
    influence = make(method, name, curvature=curvature, blocks=blocks)
    influence.fit()
    (used,) = influence.damping_used
    close_dampings(used, expected)
    check(method, name, influence, dense.block_inverse(model_at(name), matrix, names, expected))


@pytest.mark.parametrize("curvature", ["ggn", "empirical_fisher"])
@pytest.mark.parametrize("blocks", ["full", "layer"])
def test_automatic_damping_where_the_curvature_is_not_written_out(
    curvature: str, blocks: str
) -> None:
    """The trace may be estimated: v^T C v of 32 vectors of signs."""
    method, model, matrix = "CGInfluenceFunction", model_at("mlp"), curvature_of("mlp", curvature)
    names = named_blocks("mlp", blocks)
    influence = make(method, "mlp", curvature=curvature, blocks=blocks)
    influence.fit()
    values = list(influence.damping_used[0].values())
    for value, own in zip(values, names.values(), strict=True):
        index = dense.places(model, own)
        block = matrix[index][:, index]
        deviation = (2 * (block - block.diagonal().diag()).square().sum() / 32).sqrt()
        count = min(len(block), CASES["mlp"].n)
        assert abs(value * count - block.trace()) <= 4 * deviation
    damping = dict(zip(names, values, strict=True))
    check(method, "mlp", influence, dense.block_inverse(model, matrix, names, damping))


@every_case
@pytest.mark.parametrize("method", ["DataInf", *KRONECKER])
def test_automatic_damping_by_layer(method: str, name: str) -> None:
    rule = "mean" if method in KRONECKER else "auto"
    influence, model = make(method, name, damping=rule), model_at(name)
    influence.fit()
    if method == "DataInf":
        blocks = named_blocks(name, "layer")
        damping = dense.datainf_damping(model, train_gradients(name), blocks)
        inverse = dense.datainf_inverse(model, train_gradients(name), blocks, damping)
    else:
        blocks = named_blocks(name, "layer", KRONECKER_LAYERS[name])
        matrix = kronecker(method, name)
        damping = {b: dense.auto_damping(matrix, dense.places(model, o)) for b, o in blocks.items()}
        inverse = dense.block_inverse(model, matrix, blocks, damping)
    close_dampings(influence.damping_used[0], damping)
    check(method, name, influence, inverse)


@every_method
@pytest.mark.parametrize("size", [4, 9])
def test_another_data_set_for_the_curvature(method: str, size: int) -> None:
    case, model, damping = CASES["mlp"], model_at("mlp"), damping_of(method, "mlp")
    torch.manual_seed(40)
    other = case.batch(9)
    blocks = named_blocks("mlp", "full" if method in SOLVERS else "layer")
    if method == "DataInf":
        g = oracles.gradients(model, other, case.loss)
        inverse = dense.datainf_inverse(model, g, blocks, dict.fromkeys(blocks, damping))
    else:
        matrix = (
            dense.CURVATURES[USUAL[method]](model, other, case.loss)
            if method in SOLVERS
            else dense.kronecker_curvature(
                model, other, case.loss, KRONECKER_LAYERS["mlp"], KRONECKER[method]
            )
        )
        inverse = dense.block_inverse(model, matrix, blocks, damping)
    arguments = {"damping": damping, "hessian_dataset": Examples(other), "batch_size": size}
    check(method, "mlp", make(method, "mlp", **arguments), inverse)


def squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.square().flatten(1).sum(1)


@in_turn("relative, method", [None, "l", "theta"], QUICK)
def test_a_test_loss_of_its_own(method: str, relative: str | None) -> None:
    case, damping = CASES["mlp"], damping_of(method, "mlp")
    arguments = {"damping": damping, "test_loss_fn": squares, "relative": relative}
    h = oracles.gradients(model_at("mlp"), case.test, squares)
    inverse = inverse_for(method, "mlp", damping)
    expected = dense.scores(inverse, h, train_gradients("mlp"), relative)
    found = make(method, "mlp", **arguments).influence(case.test)
    assert_close(found, expected, tolerance(method))


@every_method
@pytest.mark.parametrize("layers", [["head"], ["body.2", "head"]])
def test_some_layers(method: str, layers: list[str]) -> None:
    damping, model = damping_of(method, "mlp"), model_at("mlp")
    inverse = inverse_for(method, "mlp", damping)
    if method in SOLVERS:
        inverse = solved("mlp", USUAL[method], "full", damping, tuple(layers))
    rest = dense.places(
        model, [n for n, _ in model.named_parameters() if n not in _names_in("mlp", layers)]
    )
    inverse = inverse.clone()
    inverse[rest] = 0
    check(method, "mlp", make(method, "mlp", damping=damping, layers=layers), inverse)


@in_turn(
    "relative, where",
    ["l", "theta"],
    [
        *(("CGInfluenceFunction", name) for name in ("mlp", "mlp")),
        *((method, name) for method in QUICK for name in NAMES),
    ],
)
def test_relative(relative: str, where: tuple[str, str]) -> None:
    method, name = where
    damping = damping_of(method, name)
    inverse = inverse_for(method, name, damping)
    expected = dense.scores(inverse, query_gradients(name), train_gradients(name), relative)
    influence = make(method, name, damping=damping, relative=relative)
    assert_close(influence.influence(CASES[name].test), expected, tolerance(method))


@both_relative
def test_relative_of_several_checkpoints_and_blocks(relative: str) -> None:
    case, method, damping = CASES["mlp"], "ExplicitInfluenceFunction", 0.01
    each = [
        dense.scores(
            solved("mlp", "ggn", "layer", damping, place=place),
            query_gradients("mlp", place),
            train_gradients("mlp", place),
            relative,
        )
        for place in range(3)
    ]
    arguments = {"blocks": "layer", "damping": damping, "relative": relative}
    influence = make(method, "mlp", checkpoints=case.states, **arguments)
    assert_close(influence.influence(case.test), torch.stack(each).mean(0), 1e-8)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@every_curvature
@pytest.mark.parametrize("name", ["mlp", "gpt"])
def test_reduced_losses(name: str, curvature: str, reduction: str) -> None:
    damping = dense.telling_damping(curvature_of(name, curvature))
    loss, method = reduced(CASES[name].loss, reduction), "ExplicitInfluenceFunction"
    influence = make(method, name, curvature=curvature, damping=damping, loss_fn=loss)
    check(method, name, influence, solved(name, curvature, "full", damping))


@every_method
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_dict_batches(method: str, reduction: str) -> None:
    case, damping = CASES["dict"], damping_of(method, "mlp")
    influence = make(
        method,
        "mlp",
        model=case.model(),
        data=Examples(case.train),
        loss_fn=reduced(case.loss, reduction),
        damping=damping,
    )
    expected = dense.scores(
        inverse_for(method, "mlp", damping), query_gradients("mlp"), train_gradients("mlp")
    )
    assert_close(influence.influence(case.test), expected, tolerance(method))


@every_quick_method
def test_a_damping_that_is_set_later(method: str) -> None:
    case, damping = CASES["mlp"], damping_of(method, "mlp")
    influence = make(method, "mlp", damping=7 * damping)
    influence.influence(case.test)
    influence.damping = damping
    check(method, "mlp", influence, inverse_for(method, "mlp", damping))


@every_quick_method
def test_loaders_of_uneven_batches(method: str) -> None:
    case, damping = CASES["mlp"], damping_of(method, "mlp")
    loaders = [DataLoader(Examples(case.train), batch_size=size) for size in (3, 5)]
    influence = make(method, "mlp", damping=damping, data=loaders[0], hessian_dataset=loaders[1])
    found = influence.influence(DataLoader(Examples(case.test), batch_size=3))
    inverse = inverse_for(method, "mlp", damping)
    expected = dense.scores(inverse, query_gradients("mlp"), train_gradients("mlp"))
    assert_close(found, expected, tolerance(method))


# The other results.


@every_case
@every_quick_method
def test_intermediate_quantities_are_the_solved_test_side(method: str, name: str) -> None:
    damping, layers = damping_of(method, name), make(method, name).layers
    influence = make(method, name, damping=damping)
    found = influence.compute_intermediate_quantities(CASES[name].test)
    names = [n for n, _ in model_at(name).named_parameters()]
    index = dense.places(model_at(name), names if layers is None else _names_in(name, layers))
    expected = (query_gradients(name) @ inverse_for(method, name, damping))[:, index]
    assert_close(found, expected, tolerance(method))
    assert_close(influence.influence(found), influence.influence(CASES[name].test), 1e-10)


@every_quick_method
def test_intermediate_quantities_serve_on_other_training_data(method: str) -> None:
    case, damping = CASES["mlp"], damping_of(method, "mlp")
    arguments: dict[str, Any] = {"damping": damping, "checkpoints": case.checkpoints()}
    influence = make(method, "mlp", **arguments)
    found = influence.compute_intermediate_quantities(case.test)
    assert found.shape == (case.m, 3 * 83)
    few = Examples(tuple(part[:5] for part in case.train))
    other = make(method, "mlp", data=few, **arguments).influence(found)
    assert_close(other, influence.influence(case.test)[:, :5], 1e-10)


@in_turn("relative, method", [None, "l", "theta"], QUICK)
def test_intermediate_quantities_of_a_relative_score(method: str, relative: str | None) -> None:
    arguments = {"damping": damping_of(method, "mlp"), "relative": relative}
    influence = make(method, "mlp", **arguments)
    found = influence.influence(influence.compute_intermediate_quantities(CASES["mlp"].test))
    assert_close(found, influence.influence(CASES["mlp"].test), 1e-10)


@in_turn("relative, method", [None, "l", "theta"], QUICK)
def test_layers_add_up(method: str, relative: str | None) -> None:
    case = CASES["mlp"]
    influence = make(method, "mlp", damping=damping_of(method, "mlp"), relative=relative)
    by_layer = influence.influence_by_layer(case.test)
    assert list(by_layer) == ["body.0", "body.2", "head"]
    assert_close(sum(by_layer.values()), influence.influence(case.test), 1e-10)


@every_quick_method
def test_a_layers_share_is_the_product_over_its_parameters(method: str) -> None:
    case, damping, model = CASES["mlp"], damping_of(method, "mlp"), model_at("mlp")
    by_layer = make(method, "mlp", damping=damping).influence_by_layer(case.test)
    sides = query_gradients("mlp") @ inverse_for(method, "mlp", damping)
    for layer, names in named_blocks("mlp", "layer").items():
        index = dense.places(model, names)
        expected = sides[:, index] @ train_gradients("mlp")[:, index].T
        assert_close(by_layer[layer], expected, 10 * tolerance(method))


@every_quick_method
@pytest.mark.parametrize("relative", [None, "l", "theta"])
def test_self_influence_is_the_diagonal(method: str, relative: str | None) -> None:
    case, damping = CASES["mlp"], damping_of(method, "mlp")
    g, inverse = train_gradients("mlp"), inverse_for(method, "mlp", damping)
    expected = dense.scores(inverse, g, g, relative).diagonal()
    influence = make(method, "mlp", damping=damping, relative=relative)
    assert_close(influence.self_influence(), expected, tolerance(method))
    some = tuple(part[:3] for part in case.train)
    assert_close(influence.self_influence(some), expected[:3], tolerance(method))
