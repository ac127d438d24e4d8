"""The stochastic series with a preconditioner, against solutions by dense algebra in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from influence_kit.errors import CurvatureError, InvalidArgumentError
from influence_kit.operators.operator import Operator
from influence_kit.operators.preconditioned_series import preconditioned_series

P, K, DAMPING = 6, 3, 0.01


class Matrix(Operator):
    """A symmetric matrix."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__([len(matrix)], matrix.new_empty(0))
        self.matrix = matrix

    def product(self, vectors: Tensor) -> Tensor:
        return vectors @ self.matrix


torch.manual_seed(0)
ROOTS = torch.randn(40, P, dtype=torch.float64) * torch.tensor([3.0, 1, 0.3, 0.1, 0.03, 0.01])
C = ROOTS.T @ ROOTS / 40
VECTORS = torch.randn(K, P, dtype=torch.float64)
EYE = torch.eye(P, dtype=torch.float64)
EXACT = VECTORS @ torch.linalg.inv(C + DAMPING * EYE)
M = torch.linalg.inv(torch.diag(C.diagonal() + DAMPING))


def series(**arguments: Any) -> Tensor:
    arguments = {"preconditioner": lambda v: v @ M, **arguments}
    return preconditioned_series(Matrix(C), VECTORS, DAMPING, **arguments)


def samples(repeat: int) -> Any:
    """Products with the mean over 8 of the 40 rows, others in each call."""
    generator = torch.Generator().manual_seed(repeat)

    def product(vectors: Tensor) -> Tensor:
        some = ROOTS[torch.randint(40, (8,), generator=generator)]
        return vectors @ some.T @ some / 8

    return product


def test_the_solution() -> None:
    torch.testing.assert_close(series(depth=400, tol=1e-15), EXACT, rtol=1e-10, atol=0)


def test_an_exact_preconditioner_starts_at_the_solution() -> None:
    inverse = torch.linalg.inv(C + DAMPING * EYE)
    found = series(preconditioner=lambda v: v @ inverse, depth=1, scale=1.0)
    torch.testing.assert_close(found, EXACT, rtol=1e-12, atol=0)


def test_each_iteration_is_the_formula() -> None:
    h = VECTORS @ M
    for _ in range(3):
        h = h + (VECTORS - h @ C - DAMPING * h) @ M / 2.5
    torch.testing.assert_close(series(depth=3, scale=2.5), h, rtol=1e-12, atol=0)


def test_of_samples_the_last_half_of_each_repeat_is_averaged() -> None:
    expected = torch.zeros_like(VECTORS)
    for repeat in range(2):
        product, h = samples(repeat), VECTORS @ M
        for iteration in range(5):
            h = h + (VECTORS - product(h) - DAMPING * h) @ M / 9.0
            expected += h / 3 / 2 if iteration >= 2 else 0
    found = series(depth=5, repeats=2, steps=samples, scale=9.0)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_the_mean_over_samples_comes_near_the_solution() -> None:
    found = series(depth=20_000, steps=samples)
    assert float((found - EXACT).norm() / EXACT.norm()) < 0.05


@pytest.mark.parametrize("steps", [None, samples])
def test_the_scale_is_above_the_largest_eigenvalue(steps: Any) -> None:
    """So that no iteration moves away from the solution: it stays bounded for any length."""
    found = series(depth=2000, steps=steps)
    assert float((found - EXACT).norm() / EXACT.norm()) < 0.3


def test_a_vector_of_zeros() -> None:
    found = preconditioned_series(Matrix(C), VECTORS * 0, DAMPING, lambda v: v @ M, depth=3)
    assert torch.equal(found, torch.zeros_like(VECTORS))


def test_a_preconditioner_of_zeros() -> None:
    assert torch.equal(series(preconditioner=torch.zeros_like, depth=2), torch.zeros_like(VECTORS))


def test_a_scale_that_is_too_small_is_refused() -> None:
    with pytest.raises(CurvatureError, match=r"the series diverges at scale 0\.1: use a larger"):
        series(depth=400, scale=0.1)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"scale": -1.0}, "`scale` must be"),
        ({"depth": 0}, "`depth` must be"),
        ({"repeats": 1.5}, "`repeats` must be"),
        ({"tol": 1.0}, "`tol` must be"),
        ({"preconditioner": 3}, "`preconditioner` must be"),
    ],
)
def test_bad_arguments_are_refused(arguments: Any, match: str) -> None:
    with pytest.raises(InvalidArgumentError, match=match):
        series(**arguments)
