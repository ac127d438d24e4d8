"""The preconditioners of conjugate gradients: what they are, what they save, what is reported."""

from typing import Any

import influence_oracles as dense
import oracles
import pytest
import torch
from cases import Examples
from contract import assert_close
from torch import Tensor, nn
from torch.nn import functional as F

import influence_kit
from influence_kit import CGInfluenceFunction, EKFACInfluenceFunction, ExplicitInfluenceFunction
from influence_kit.curvature import EKFAC, KFAC, Explicit, kronecker_fit, sample_preconditioner
from influence_kit.curvature.conjugate_gradients import Solved
from influence_kit.curvature.sample_preconditioner import SamplePreconditioner
from influence_kit.errors import InvalidArgumentError
from influence_kit.gradients.forms import Dense
from influence_kit.gradients.per_example import Gradients
from influence_kit.operators.partition import Partition

N, M, DAMPING = 120, 6, 1e-3


def trained(classes: int = 4) -> tuple[nn.Module, Any, Any]:
    """A small network after a few steps, its training set and test examples, in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, classes)).double()
    x = torch.randn(N + M, 10).double()
    y = (x @ torch.randn(10, classes).double()).argmax(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x[:N]), y[:N]).backward()
        optimizer.step()
    return model, (x[:N], y[:N]), (x[N:], y[N:])


MODEL, TRAIN, TEST = trained()


def make(kind: Any = CGInfluenceFunction, checkpoints: Any = None, **arguments: Any) -> Any:
    checkpoints = [MODEL.state_dict()] if checkpoints is None else checkpoints
    arguments = {"loss_fn": nn.CrossEntropyLoss(), "damping": DAMPING, **arguments}
    return kind(MODEL, Examples(TRAIN), checkpoints, **arguments)


EXACT = make(ExplicitInfluenceFunction, curvature="ggn").influence(TEST)


def iterations(preconditioner: Any, tol: float = 1e-6, **arguments: Any) -> float:
    cg = make(preconditioner=preconditioner, tol=tol, max_iter=400, **arguments)
    assert_close(cg.influence(TEST), EXACT, 1e-4)
    (found,), (residuals,) = cg.iterations, cg.residuals
    assert found.shape == residuals.shape == (M,)
    assert residuals.dtype == torch.float64
    assert bool((residuals <= tol).all())
    return float(found.double().mean())


# What is saved.


def test_a_sample_saves_more_than_half_of_the_iterations() -> None:
    plain = iterations(None)
    assert iterations("sample") < plain / 2
    assert iterations("auto") == iterations("sample")
    assert plain > 20, "too few for a comparison"


def test_of_two_classes_a_sample_of_all_examples_is_the_inverse() -> None:
    """One slope per example has the whole of its Gauss-Newton matrix."""
    model, train, test = trained(2)
    exact = ExplicitInfluenceFunction(
        model, Examples(train), [model.state_dict()], loss_fn=F.cross_entropy, damping=DAMPING
    )
    cg = CGInfluenceFunction(
        model, Examples(train), [model.state_dict()], loss_fn=F.cross_entropy, damping=DAMPING
    )
    assert_close(cg.influence(test), exact.influence(test), 1e-8)
    assert cg.iterations[0].tolist() == [1] * M


def test_the_first_iterate_is_the_preconditioner_times_the_best_factor() -> None:
    ekfac = make(EKFACInfluenceFunction)
    with pytest.warns(UserWarning, match="stopped after 1 iterations with relative residuals"):
        found = make(preconditioner="ekfac", max_iter=1).influence(TEST)
    expected = ekfac.influence(TEST)
    factors = (found / expected).mean(1, keepdim=True)
    assert_close(found, factors * expected, 1e-5)


# The sample.


def gradients(rows: Tensor, sizes: tuple[int, int] = (3, 2)) -> Gradients:
    parts = rows.split(list(sizes), dim=1)
    shapes = {name: torch.Size([size]) for name, size in zip("ab", sizes, strict=True)}
    forms = {name: Dense(p, shapes[name]) for name, p in zip("ab", parts, strict=True)}
    return Gradients(len(rows), forms, shapes, rows.new_empty(0))


@pytest.mark.parametrize("blocks", [{"full": ["a", "b"]}, {"0": ["a"], "1": ["b"]}])
def test_the_inverse_of_a_sample(blocks: Any) -> None:
    torch.manual_seed(1)
    rows, vectors = torch.randn(7, 5).double(), torch.randn(4, 5).double()
    damping = torch.linspace(0.1, 0.3, len(blocks)).double()
    partition = Partition(blocks, {"a": torch.Size([3]), "b": torch.Size([2])})
    found = SamplePreconditioner([gradients(rows[:4]), gradients(rows[4:])], partition, damping)
    matrix = rows.T @ rows / 7
    if len(blocks) == 2:
        matrix = torch.block_diag(matrix[:3, :3], matrix[3:, 3:])
    lift = damping.repeat_interleave(torch.tensor(partition.sizes)).diag()
    assert_close(found(vectors), vectors @ torch.linalg.inv(matrix + lift), 1e-12)


def sample_of(**arguments: Any) -> Tensor:
    """The gradients of the sample, in the order of the preconditioner."""
    cg = make(max_iter=300, preconditioner="sample", **arguments)
    cg.influence(TEST)
    made = cg._fitted.cache.inverses[0].preconditioner(None)
    return torch.cat([part.flat() for part in made.sample])


def test_few_examples_have_several_draws() -> None:
    rows = sample_of()
    assert len(rows) == 4 * N
    # the mean over draws of outer products is about the Gauss-Newton matrix
    exact = dense.gauss_newton(MODEL, TRAIN, nn.CrossEntropyLoss(reduction="none"))
    assert (rows.T @ rows / len(rows) - exact).norm() < 0.2 * exact.norm()
    first, *others = rows.split(N)
    assert not any(torch.equal(first, other) for other in others)


def test_many_examples_are_sampled_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_preconditioner, "MOST_GRADIENTS", 32)
    monkeypatch.setattr(influence_kit.curvature.preconditioners, "MOST_GRADIENTS", 32)
    rows = sample_of(curvature="empirical_fisher")
    every = oracles.gradients(MODEL, TRAIN, nn.CrossEntropyLoss(reduction="none"))
    assert_close(rows, every[::4])  # 16 to 32 examples


def test_less_memory_has_fewer_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    # of a gradient: inputs and output gradients of both layers, in float64
    monkeypatch.setattr(sample_preconditioner, "resident_bytes", lambda _: 2 * 4 * 10 * 8 * 60)
    rows = sample_of()
    assert 4 <= len(rows) < 4 * N
    monkeypatch.setattr(sample_preconditioner, "resident_bytes", lambda _: 1)
    assert len(sample_of()) == 4


def focal(outputs: Tensor, targets: Tensor) -> Tensor:
    losses = F.cross_entropy(outputs, targets, reduction="none")
    return (1 - (-losses).exp()).square() * losses


def test_a_loss_that_is_no_likelihood_has_gradients_at_the_labels_of_the_data() -> None:
    rows = sample_of(loss_fn=focal, damping=0.3, curvature="empirical_fisher")
    assert_close(rows, oracles.gradients(MODEL, TRAIN, focal))
    assert_close(sample_of(loss_fn=focal, damping=0.3), rows)


def test_a_large_damping_has_no_preconditioner_by_default() -> None:
    """Above 1/24 of the largest eigenvalue of the sample."""
    largest = float(torch.linalg.matrix_norm(sample_of(damping=1.0), 2)) ** 2 / (4 * N)
    found = {}
    for damping in (largest / 25, largest / 23):
        cg = make(max_iter=300, damping=damping)
        cg.influence(TEST)
        found[damping] = cg._fitted.cache.inverses[0].preconditioner is None
    assert list(found.values()) == [False, True]


def test_a_damping_of_zero_has_no_preconditioner() -> None:
    train = (torch.randn(40, 3).double(), torch.randn(40, 1).double())
    model = nn.Linear(3, 1).double()
    arguments = {"loss_fn": nn.MSELoss(reduction="none"), "damping": 0.0}
    arguments["loss_fn"] = lambda o, t: (o - t).square().sum(1)
    cg, exact = (
        kind(model, Examples(train), [model.state_dict()], **arguments)
        for kind in (CGInfluenceFunction, ExplicitInfluenceFunction)
    )
    assert_close(cg.influence(train), exact.influence(train), 1e-5)
    assert cg._fitted.cache.inverses[0].preconditioner is None


# Inverse curvatures and fitted methods.


@pytest.mark.parametrize(
    "preconditioner", [EKFAC(rtol=0.0), KFAC(seed=3, rtol=0.0), Explicit(curvature="fisher")]
)
def test_any_inverse_curvature(preconditioner: Any) -> None:
    """The scores are the exact ones, and the residuals those that were asked for."""
    iterations(preconditioner, tol=1e-5)


def test_an_exact_inverse_takes_one_iteration() -> None:
    assert iterations(Explicit(curvature="ggn")) == 1


def test_a_parameter_without_a_factor_is_divided_by_the_damping() -> None:
    """A layer that no training example reaches has no eigenvalues, and queries may reach it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    model[0].bias.data.fill_(-100)  # dead units
    x, y = torch.randn(20, 4).double(), torch.arange(20) % 3
    arguments = {"loss_fn": F.cross_entropy, "damping": 0.1}
    states = [model.state_dict()]
    cg = CGInfluenceFunction(model, Examples((x, y)), states, preconditioner="ekfac", **arguments)
    exact = ExplicitInfluenceFunction(model, Examples((x, y)), states, **arguments)
    test = (40 * torch.randn(5, 4).double(), torch.arange(5) % 3)
    assert_close(cg.influence(test), exact.influence(test), 1e-5)


def test_the_fit_of_another_method_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    states = [MODEL.state_dict(), {k: 0.9 * v for k, v in MODEL.state_dict().items()}]
    ekfac = make(EKFACInfluenceFunction, states).fit()
    expected = make(preconditioner="ekfac", checkpoints=states, max_iter=300).influence(TEST)

    def refuse(*_: Any) -> None:
        raise AssertionError("it was fitted again")

    monkeypatch.setattr(kronecker_fit.KroneckerFit, "__call__", refuse)
    cg = make(preconditioner=ekfac, checkpoints=states, max_iter=300)
    assert_close(cg.influence(TEST), expected, 1e-4)
    assert "preconditioner=EKFACInfluenceFunction" in repr(cg)
    assert len(cg.residuals) == len(cg.iterations) == 2


def test_a_method_without_a_fit_is_fitted() -> None:
    ekfac = make(EKFACInfluenceFunction)
    assert iterations(ekfac, tol=1e-5) > 1
    assert not ekfac.fit_state, "the other method stays as it is"


def test_a_method_of_something_else_is_refused() -> None:
    ekfac = make(EKFACInfluenceFunction, layers=["0"])
    match = "`preconditioner` belongs to 1 checkpoints with the blocks 0; here are 1 checkpoints"
    with pytest.raises(InvalidArgumentError, match=match):
        make(preconditioner=ekfac).influence(TEST)
    ekfac = make(EKFACInfluenceFunction, [MODEL.state_dict()] * 2)
    with pytest.raises(InvalidArgumentError, match="belongs to 2 checkpoints"):
        make(preconditioner=ekfac).influence(TEST)


def test_the_fit_of_a_preconditioner_is_saved(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {"preconditioner": "ekfac", "max_iter": 300}
    cg = make(**arguments)
    expected = cg.influence(TEST)
    cg.save(tmp_path)

    def refuse(*_: Any) -> None:
        raise AssertionError("it was fitted again")

    monkeypatch.setattr(kronecker_fit.KroneckerFit, "__call__", refuse)
    assert_close(make(**arguments).load(tmp_path).influence(TEST), expected, 1e-10)
    with pytest.raises(InvalidArgumentError, match="preconditioner"):
        make(preconditioner="kfac").load(tmp_path)


# What is reported.


def test_residuals_are_those_of_the_solutions() -> None:
    cg = make(max_iter=4, tol=1e-9)
    with pytest.warns(UserWarning, match="stopped after 4 iterations") as caught:
        vectors = cg.compute_intermediate_quantities(TEST)
    exact = dense.gauss_newton(MODEL, TRAIN, nn.CrossEntropyLoss(reduction="none"))
    damped = exact + DAMPING * torch.eye(len(exact)).double()
    h = oracles.gradients(MODEL, TEST, nn.CrossEntropyLoss(reduction="none"))
    residuals = (h - vectors @ damped).norm(dim=1) / h.norm(dim=1)
    assert_close(cg.residuals[0], residuals, 1e-6)
    assert cg.iterations[0].tolist() == [4] * M
    assert f"up to {float(residuals.max()):.2g}" in str(caught[0].message)


def test_reports_are_those_of_the_latest_call() -> None:
    cg = make(batch_size=40)
    assert cg.residuals == []
    cg.influence(TEST)
    assert [len(found) for found in cg.residuals] == [M]
    cg.self_influence(tuple(part[:3] for part in TEST))
    assert [len(found) for found in cg.residuals] == [3]
    assert isinstance(cg._fitted.cache.inverses[0], Solved)
