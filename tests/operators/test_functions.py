"""Operators of any function of parameters, and their inverses, against dense matrices."""

from typing import Any

import pytest
import torch
from contract import assert_close
from torch import Tensor
from torch.autograd.functional import hessian as dense_hessian
from torch.autograd.functional import jacobian

from influence_kit.errors import CurvatureError, InvalidArgumentError
from influence_kit.operators import fisher, gauss_newton, hessian, inverse

P, N = 6, 9


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


X, Y = draw(N, 2), draw(N, 2, seed=1)
# the same numbers in each structure that parameters may have: a matrix [2, 2] and a vector [2]
STRUCTURES: dict[str, Any] = {
    "tensor": lambda v: v,
    "tuple": lambda v: (v[:4].view(2, 2), v[4:]),
    "list": lambda v: [v[:4].view(2, 2), v[4:]],
    "dict": lambda v: {"w": v[:4].view(2, 2), "b": v[4:]},
}
structures = pytest.mark.parametrize("structure", STRUCTURES)
both_modes = pytest.mark.parametrize("mode", ["forward", "reverse"])
POINT, VECTORS = draw(P, seed=2), draw(4, P, seed=3)


def outputs(parameters: Any) -> Tensor:
    if isinstance(parameters, Tensor):
        w, b = parameters[:4].view(2, 2), parameters[4:]
    else:
        w, b = parameters.values() if isinstance(parameters, dict) else parameters
    return (X @ w + b).tanh()


def loss(values: Tensor) -> Tensor:
    return (values - Y).pow(4).sum()


def losses(parameters: Any) -> Tensor:
    return (outputs(parameters) - Y).pow(4).sum(1)


def dense_gauss_newton() -> Tensor:
    j = jacobian(outputs, POINT).reshape(-1, P)
    h = dense_hessian(loss, outputs(POINT)).reshape(2 * N, 2 * N)
    return j.T @ h @ j


@structures
@both_modes
def test_hessian(structure: str, mode: str) -> None:
    operator = hessian(lambda p: loss(outputs(p)), STRUCTURES[structure](POINT), mode)
    expected = dense_hessian(lambda p: loss(outputs(p)), POINT)
    assert_close(operator.product(VECTORS), VECTORS @ expected)
    assert_close(operator.dense()[0], expected)
    assert operator.size == P


@structures
@both_modes
def test_gauss_newton(structure: str, mode: str) -> None:
    operator = gauss_newton(outputs, loss, STRUCTURES[structure](POINT), mode)
    assert_close(operator.product(VECTORS), VECTORS @ dense_gauss_newton())


@structures
def test_fisher(structure: str) -> None:
    operator = fisher(losses, STRUCTURES[structure](POINT))
    g = jacobian(losses, POINT)
    assert_close(operator.product(VECTORS), VECTORS @ g.T @ g / N)


@both_modes
def test_the_hessian_of_a_sum_of_sines(mode: str) -> None:
    x = torch.linspace(0.1, 3, 7).double()
    operator = hessian(lambda values: values.sin().sum(), x, mode)
    assert_close(operator.dense()[0], torch.diag(-x.sin()))
    assert_close(operator.product(VECTORS[:, :1].expand(-1, 7)), -x.sin() * VECTORS[:, :1])


def test_the_diagonal_and_trace_of_a_diagonal_matrix_are_exact() -> None:
    # v_i C_ij v_j averages to C_ii for any signs where nothing is off the diagonal
    x = torch.linspace(0.1, 3, 7).double()
    operator = hessian(lambda values: values.sin().sum(), x)
    assert_close(operator.diagonal(), -x.sin())
    assert_close(operator.traces(), -x.sin().sum()[None])


def test_the_diagonal_is_estimated_without_bias() -> None:
    c = dense_gauss_newton()
    operator = gauss_newton(outputs, loss, POINT)
    found = torch.stack([operator.diagonal(seed) for seed in range(200)])
    # the mean of 200 independent estimates, 5 standard errors
    bound = 5 * found.std(0) / 200**0.5
    assert bool(((found.mean(0) - c.diagonal()).abs() <= bound).all())
    assert bool((bound < 0.2 * c.diagonal().max()).all()), "the bound says nothing"
    assert torch.equal(operator.diagonal(3), operator.diagonal(3))
    assert not torch.equal(operator.diagonal(3), operator.diagonal(4))


DAMPING = 3.0
SOLVERS: dict[str, dict[str, Any]] = {
    "cholesky": {},
    "cg": {"tol": 1e-13},
    "lissa": {"depth": 20000, "tol": 1e-14},
    "arnoldi": {"steps": P},
    "nystrom": {"rank": P},
}


@pytest.mark.parametrize(
    ("structure", "solver"),
    [*(("tensor", solver) for solver in SOLVERS), *((s, "cholesky") for s in STRUCTURES)],
)
def test_every_solver_inverts(structure: str, solver: str) -> None:
    operator = gauss_newton(outputs, loss, STRUCTURES[structure](POINT))
    solve = inverse(operator, solver, DAMPING, **SOLVERS[solver])
    expected = torch.linalg.solve(dense_gauss_newton() + DAMPING * torch.eye(P).double(), VECTORS.T)
    assert_close(solve(VECTORS), expected.T, 1e-9)


def test_least_squares_in_closed_form() -> None:
    """One step of Newton from anywhere is the ridge regression."""
    a, b, ridge = draw(12, 4, seed=4), draw(12, seed=5), 0.3
    x = draw(4, seed=6)
    objective = lambda w: 0.5 * (a @ w - b).square().sum()  # noqa: E731
    slope = a.T @ (a @ x - b) + ridge * x
    found = x - inverse(hessian(objective, x), "cg", ridge, tol=1e-14)(slope[None])[0]
    assert_close(found, torch.linalg.solve(a.T @ a + ridge * torch.eye(4).double(), a.T @ b), 1e-9)


def test_an_inverse_serves_for_any_number_of_vectors() -> None:
    solve = inverse(gauss_newton(outputs, loss, POINT), damping=DAMPING)
    many = draw(3 * P, P, seed=7)
    assert_close(torch.cat([solve(v[None]) for v in many]), solve(many))


def test_an_arnoldi_inverse_with_complement_divides_the_rest_by_the_damping() -> None:
    """A matrix of rank 2: two steps from its range would do; any start needs one more."""
    a = draw(2, P, seed=8)
    operator = hessian(lambda w: 0.5 * (a @ w).square().sum(), POINT)
    exact = torch.linalg.inv(a.T @ a + 0.5 * torch.eye(P).double())
    found = inverse(operator, "arnoldi", 0.5, steps=P, complement=True)(VECTORS)
    assert_close(found, VECTORS @ exact, 1e-9)
    # without it vectors that the subspace does not have go to zero
    outside = VECTORS - VECTORS @ torch.linalg.pinv(a) @ a
    start = operator.normal(1, 0)
    outside = outside - (outside @ start.T) / start.square().sum() * start
    outside = outside - outside @ torch.linalg.pinv(torch.cat([a, start])) @ torch.cat([a, start])
    found = inverse(operator, "arnoldi", 0.5, steps=P)(outside)
    assert found.abs().max() <= 1e-10 * outside.abs().max()


@pytest.mark.parametrize("solver", ["cholesky", "arnoldi"])
def test_a_singular_matrix_without_damping_is_refused(solver: str) -> None:
    a = draw(2, 4, seed=8)
    operator = hessian(lambda w: 0.5 * (a @ w).square().sum(), torch.zeros(4).double())
    options = {"steps": 4} if solver == "arnoldi" else {}
    with pytest.raises(CurvatureError, match="singular"):
        inverse(operator, solver, **options)(VECTORS[:, :4])


def test_an_unknown_solver_is_refused() -> None:
    match = '`solver` must be "cholesky", "cg", "lissa", "arnoldi" or "nystrom"; got \'lu\''
    with pytest.raises(InvalidArgumentError, match=match):
        inverse(gauss_newton(outputs, loss, POINT), "lu")  # type: ignore[arg-type]


def test_an_operator_keeps_the_dtype_of_its_parameters() -> None:
    operator = hessian(lambda w: w.sin().sum(), torch.full((3,), -1.0))
    assert operator.product(torch.ones(2, 3)).dtype == torch.float32
    options = SOLVERS | {"cg": {}, "lissa": {"depth": 50}, "arnoldi": {"steps": 3}}
    for solver, own in options.items():
        found = inverse(operator, solver, 2.0, **own)(torch.ones(2, 3))
        assert found.dtype == torch.float32
        # one step spans what is needed of a multiple of the identity but for the rest of Arnoldi's
        if solver != "arnoldi":
            assert torch.allclose(found, 1 / (2 + torch.ones(2, 3).sin()), rtol=1e-4), solver
