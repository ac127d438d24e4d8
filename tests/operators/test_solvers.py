"""Solvers on matrices that are written out: values, iterations, warnings and errors."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract import assert_close
from matrices import Matrix, normal, symmetric
from torch import Tensor

from influence_kit.errors import CurvatureError, InvalidArgumentError
from influence_kit.operators import (
    Cholesky,
    JacobiPreconditioner,
    NystromPreconditioner,
    conjugate_gradients,
    largest_eigenvalue,
    lissa,
)
from influence_kit.operators.damping_by_block import damping_by_block

P = 12
SPECTRUM = torch.logspace(0, -2, P).tolist()


def matrix(seed: int = 0) -> Matrix:
    return Matrix(symmetric(SPECTRUM, seed))


# Damping.


def test_damping_by_block_takes_one_value_or_one_a_block() -> None:
    expected = torch.tensor([0.5, 0.5], dtype=torch.float64)
    assert torch.equal(damping_by_block(0.5, 2), expected)
    for given in ([0.5, 2.0], torch.tensor([0.5, 2.0])):
        found = damping_by_block(given, 2)
        assert torch.equal(found, torch.tensor([0.5, 2.0], dtype=torch.float64))


@pytest.mark.parametrize(
    ("damping", "positive", "match"),
    [
        ([0.1, 0.2, 0.3], False, r"got \[3\] values of damping for 2 blocks"),
        (-0.1, False, r"damping must be finite and not negative; got -0\.1"),
        ([0.1, float("nan")], False, "damping must be finite and not negative"),
        (float("inf"), False, "damping must be finite and not negative; got inf"),
        ([0.1, 0.0], True, r"damping must be positive here, .* got \[0\.1, 0\.0\]"),
    ],
)
def test_dampings_that_cannot_be_meant(damping: Any, positive: bool, match: str) -> None:
    with pytest.raises(InvalidArgumentError, match=match):
        damping_by_block(damping, 2, positive)


# Cholesky.


def test_cholesky_inverts_each_block_with_its_damping() -> None:
    operator = Matrix(symmetric([3.0, 1.0, 0.0]), symmetric([2.0, 0.5], 1))
    vectors = normal(4, 5)
    found = Cholesky(operator.dense(), [0.1, 0.7])(vectors)
    assert_close(found, vectors @ operator.inverse([0.1, 0.7]))
    assert Cholesky(operator.dense(), 1.0)(vectors.float()).dtype == torch.float32


@pytest.mark.parametrize(
    ("eigenvalues", "damping", "match"),
    [
        (
            [3.0, 1.0, 0.0],
            0.0,
            r"block 'two' is singular: its 3 eigenvalues go from \S+ to 3, and damping 0 does not",
        ),
        # Cholesky's factors exist by rounding: 1e-17 is no eigenvalue
        ([1.0, 1.0, 1e-17], 0.0, "block 'two' is singular"),
        (
            [3.0, -0.25, -2.0],
            0.5,
            r"block 'two' has 2 negative eigenvalues: its 3 eigenvalues go from -2 to 3, and damp"
            r"ing 0\.5 does not make it .* Use a damping above 2, or curvature='ggn'",
        ),
    ],
)
def test_what_cholesky_cannot_invert(eigenvalues: list[float], damping: float, match: str) -> None:
    blocks = [symmetric([1.0, 2.0]), symmetric(eigenvalues)]
    with pytest.raises(CurvatureError, match=match):
        Cholesky(blocks, damping, ["one", "two"])


def test_the_damping_that_choleskys_error_names_is_enough() -> None:
    block = symmetric([3.0, -0.25, -2.0])
    Cholesky([block], 2.0 + 3e-8)


# Conjugate gradients.


@pytest.mark.parametrize("k", [1, 2, 3 * P])
def test_conjugate_gradients_with_any_number_of_right_hand_sides(k: int) -> None:
    operator, vectors = matrix(), normal(k, P, seed=1)
    found = conjugate_gradients(operator, vectors, 0.01, tol=1e-13)
    assert_close(found, vectors @ operator.inverse(0.01))


def test_a_row_does_not_depend_on_the_others() -> None:
    # rows that end at once (zero, an eigenvector), soon (two of them) and late
    _, basis = torch.linalg.eigh(matrix().blocks[0])
    rows = [torch.zeros(P).double(), basis[:, 0], basis[:, 1] + basis[:, 2], normal(P, seed=3)]
    vectors = torch.stack([rows[i] for i in (3, 0, 2, 1)]) * torch.tensor([[1e-9], [1], [1e9], [1]])
    operator = matrix()
    found = conjugate_gradients(operator, vectors, 0.01, tol=1e-12)
    # each alone, also at its own scale
    alone = torch.cat([conjugate_gradients(matrix(), v[None], 0.01, tol=1e-12) for v in vectors])
    for one, both, v in zip(alone, found, vectors, strict=True):
        torch.testing.assert_close(one, both, rtol=0, atol=1e-12 * float(v.norm()) / 0.02)
        torch.testing.assert_close(
            both, v @ operator.inverse(0.01), rtol=0, atol=1e-9 * float(v.norm())
        )
    assert torch.equal(found[1], torch.zeros(P).double())
    # the zero row never starts, one eigenvector takes one product, two of them two
    assert operator.widths[:3] == [3, 2, 1]
    assert set(operator.widths[3:]) == {1}


def test_right_hand_sides_that_are_all_zero_cost_nothing() -> None:
    operator = matrix()
    assert torch.equal(
        conjugate_gradients(operator, torch.zeros(3, P).double(), 0.1), normal(3, P) * 0
    )
    assert operator.products == 0


@pytest.mark.filterwarnings("ignore:conjugate gradients stopped")
@pytest.mark.parametrize("iterations", [1, 4, 10])
def test_one_product_an_iteration(iterations: int) -> None:
    operator = matrix()
    conjugate_gradients(operator, normal(5, P), 0.001, max_iter=iterations, tol=0.0)
    assert operator.widths == [5] * iterations


def test_as_many_iterations_as_there_are_eigenvalues() -> None:
    operator = Matrix(symmetric([5.0] * 4 + [2.0] * 5 + [0.5] * 3))
    conjugate_gradients(operator, normal(5, P), 0.1, tol=1e-10)
    assert operator.products == 3


@pytest.mark.filterwarnings("ignore:conjugate gradients stopped")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_iterations_past_convergence_change_nothing(dtype: torch.dtype) -> None:
    operator = Matrix(symmetric(torch.logspace(0, -1, 18).tolist()).to(dtype))
    vectors = normal(7, 18).to(dtype)
    found = conjugate_gradients(operator, vectors, 0.1, max_iter=50, tol=0.0)
    assert found.dtype == dtype
    assert_close(found.double(), vectors.double() @ operator.inverse(0.1), 1e-5)
    more = conjugate_gradients(operator, vectors, 0.1, max_iter=500, tol=0.0)
    assert_close(more.double(), found.double(), 1e-5)


def test_a_right_hand_side_that_is_solved_exactly_ends_without_a_division_by_zero() -> None:
    operator = Matrix(torch.eye(4).double())
    found = conjugate_gradients(operator, torch.ones(2, 4).double(), 1.0, max_iter=50, tol=0.0)
    assert torch.equal(found, torch.full((2, 4), 0.5).double())
    assert operator.products == 1


def test_blocks_are_solved_apart() -> None:
    """A block that converges at once waits for the other, and neither sees the other's numbers."""
    blocks = symmetric([1.0] * 3), symmetric(SPECTRUM, 1), symmetric([1e6, 1.0, 1e-2], 2)
    operator, damping = Matrix(*blocks), [0.1, 0.01, 0.001]
    vectors = normal(4, 3 + P + 3, seed=2)
    vectors[0, :3] = 0
    vectors[1, 3:] *= 1e-8
    found = conjugate_gradients(operator, vectors, damping, tol=1e-12)
    parts = zip(
        blocks, damping, vectors.split([3, P, 3], 1), found.split([3, P, 3], 1), strict=True
    )
    for block, value, part, own in parts:
        alone = conjugate_gradients(Matrix(block), part, value, tol=1e-12)
        expected = part @ Matrix(block).inverse(value)
        for row, single, exact in zip(own, alone, expected, strict=True):
            assert (row - exact).norm() <= 1e-8 * exact.norm()
            assert (single - exact).norm() <= 1e-8 * exact.norm()


def residuals(operator: Matrix, damping: float, x: Tensor, vectors: Tensor) -> Tensor:
    damped = operator.blocks[0] + damping * torch.eye(P).double()
    return (vectors - x @ damped).norm(dim=1) / vectors.norm(dim=1)


def test_a_warning_tells_the_true_residual_of_what_is_not_done() -> None:
    operator, vectors = matrix(), normal(5, P)
    vectors[2] = 0
    with pytest.warns(UserWarning, match="stopped after 3 iterations") as caught:
        found = conjugate_gradients(operator, vectors, 0.001, max_iter=3, tol=1e-6)
    left = residuals(operator, 0.001, found, vectors).nan_to_num()
    told = f"residuals up to {float(left.max()):.2g} (tol: 1e-06) in 4 of 5 rows"
    assert told in str(caught[0].message)
    assert float(left.max()) > 0.1


def test_no_warning_where_all_is_done() -> None:
    operator, vectors = matrix(), normal(5, P)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = conjugate_gradients(operator, vectors, 0.001, max_iter=100, tol=1e-6)
    assert residuals(operator, 0.001, found, vectors).max() <= 1e-6 * (1 + 1e-6)


def test_an_indefinite_matrix_is_refused_with_a_direction() -> None:
    operator = Matrix(symmetric([3.0, 1.0, 0.5, -0.5]))
    match = r"the damped curvature is -0\.\d+ along a direction, so it is not positive definite"
    with pytest.raises(CurvatureError, match=match):
        conjugate_gradients(operator, normal(3, 4), 0.1)
    # and taken where the damping is above the lowest eigenvalue
    found = conjugate_gradients(operator, normal(3, 4), 0.6, tol=1e-12)
    assert_close(found, normal(3, 4) @ operator.inverse(0.6))


def test_conjugate_gradients_that_diverge_are_refused() -> None:
    class Rotated(Matrix):
        """Not symmetric, which conjugate gradients do not forgive."""

        def product(self, vectors: Tensor) -> Tensor:
            turned = torch.cat([vectors[:, 1:], -vectors[:, :1]], dim=1)
            return super().product(vectors) * 1e-3 + 10 * turned

    with pytest.raises(CurvatureError, match="conjugate gradients diverge: the residual has grown"):
        conjugate_gradients(Rotated(torch.eye(6).double()), normal(2, 6), 0.0, max_iter=400)


# Preconditioners.

# a diagonal over five orders of magnitude with some coupling, and a few large eigenvalues
SCALED = torch.diag(torch.logspace(2, -3, 40, dtype=torch.float64).sqrt())
COUPLED = SCALED @ (torch.eye(40).double() + 0.02 * symmetric([1.0] * 20 + [-1.0] * 20)) @ SCALED
SPIKED = symmetric([*torch.logspace(4, 1, 10).tolist(), *([1e-3] * 30)])
PRECONDITIONERS: dict[str, tuple[Tensor, Callable[[Matrix], Any]]] = {
    "jacobi": (COUPLED, lambda operator: JacobiPreconditioner(operator, 1e-3)),
    "nystrom": (SPIKED, lambda operator: NystromPreconditioner(operator, 1e-3, 12)),
}


@pytest.mark.parametrize("name", PRECONDITIONERS)
def test_preconditioners_save_iterations(name: str) -> None:
    block, make = PRECONDITIONERS[name]
    operator, vectors = Matrix(block), normal(3, 40)
    plain = conjugate_gradients(operator, vectors, 1e-3, max_iter=2000, tol=1e-8)
    without, preconditioner = operator.products, make(operator)
    operator.widths.clear()
    found = conjugate_gradients(
        operator, vectors, 1e-3, max_iter=2000, tol=1e-8, preconditioner=preconditioner
    )
    assert operator.products <= without / 2, (operator.products, without)
    exact = vectors @ operator.inverse(1e-3)
    assert_close(found, exact, 1e-4)
    assert_close(plain, exact, 1e-4)


def test_the_nystrom_preconditioner_of_full_rank_is_a_multiple_of_the_inverse() -> None:
    operator, vectors = matrix(), normal(3, P)
    found = NystromPreconditioner(operator, 0.1, P)(vectors)
    assert_close(found, vectors @ operator.inverse(0.1) * (min(SPECTRUM) + 0.1))
    conjugate_gradients(
        operator, vectors, 0.1, preconditioner=NystromPreconditioner(operator, 0.1, P)
    )
    assert operator.products == 3  # one for each preconditioner and one iteration


def test_the_jacobi_preconditioner_of_a_diagonal_matrix_is_its_inverse() -> None:
    operator = Matrix(torch.diag(torch.tensor(SPECTRUM)).double(), torch.eye(3).double())
    vectors = normal(3, P + 3)
    found = JacobiPreconditioner(operator, [0.1, 2.0])(vectors)
    assert_close(found, vectors @ operator.inverse([0.1, 2.0]))


@pytest.mark.parametrize(
    "make", [JacobiPreconditioner, lambda o, d: NystromPreconditioner(o, d, 3)]
)
def test_preconditioners_want_a_positive_damping(make: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="damping must be positive here"):
        make(matrix(), 0.0)


# LiSSA.


@pytest.mark.parametrize("scale", [1.2, 3.0, "auto"])
def test_the_fixed_point_of_lissa_does_not_depend_on_the_scale(scale: Any) -> None:
    operator, vectors = matrix(), normal(5, P)
    found = lissa(operator, vectors, 0.1, depth=2000, scale=scale)
    assert_close(found, vectors @ operator.inverse(0.1))


def test_lissa_by_hand() -> None:
    operator, v, h = matrix(), normal(2, P), normal(2, P)
    for _ in range(3):
        h = v + h - (h @ operator.blocks[0] + 0.1 * h) / 2.5
    assert_close(lissa(operator, v, 0.1, depth=3, scale=2.5), h / 2.5)
    assert operator.products == 3


def test_lissa_stops_where_nothing_moves() -> None:
    operator, vectors = matrix(), normal(2, P)
    vectors[1] = 0
    found = lissa(operator, vectors, 1.0, depth=10000, scale=2.5, tol=1e-14)
    assert operator.products < 100
    assert_close(found, vectors @ operator.inverse(1.0))


def test_lissa_with_blocks_of_their_own_damping() -> None:
    operator = Matrix(symmetric([2.0, 1.0]), symmetric([0.5, 0.1, 0.1], 1))
    vectors, damping = normal(3, 5), [0.2, 0.4]
    found = lissa(operator, vectors, damping, depth=2000)
    assert_close(found, vectors @ operator.inverse(damping))


@pytest.mark.parametrize(
    ("eigenvalues", "damping", "scale"),
    [([3.0, 1.0], 0.1, 1.0), ([3.0, -0.5], 0.1, "auto")],
    ids=["scale too small", "indefinite"],
)
def test_a_lissa_that_diverges_is_refused(
    eigenvalues: list[float], damping: float, scale: Any
) -> None:
    match = r"LiSSA diverges at scale \d\S*: the scale must be above the largest eigenvalue"
    with pytest.raises(CurvatureError, match=match):
        lissa(Matrix(symmetric(eigenvalues)), normal(2, 2), damping, depth=5000, scale=scale)


def test_a_small_damping_is_no_divergence() -> None:
    """The solution is 1e8 times the right-hand side."""
    operator = Matrix(torch.diag(torch.tensor([1.0, 0.0])).double())
    found = lissa(operator, torch.ones(1, 2).double(), 1e-8, depth=50, scale=2.0)
    assert bool(torch.isfinite(found).all())


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), "big", None])
def test_a_scale_that_is_none(scale: Any) -> None:
    with pytest.raises(InvalidArgumentError, match='`scale` must be a positive number or "auto"'):
        lissa(matrix(), normal(1, P), 0.1, scale=scale)


def test_repeats_of_lissa_take_samples_of_their_own_and_are_averaged() -> None:
    operator, v = matrix(), normal(3, P)
    steps_of = lambda repeat: lambda h: h * (0.5 + 0.25 * repeat)  # noqa: E731
    each = [lissa(operator, v, 0.1, 40, 1, 2.0, lambda _, r=r: steps_of(r)) for r in range(3)]
    found = lissa(operator, v, 0.1, 40, 3, 2.0, steps_of)
    assert_close(found, torch.stack(each).mean(0))
    assert not torch.allclose(each[0], each[1])
    assert operator.products == 0, "a sample stands in for the whole"


@pytest.mark.parametrize("spectrum", [[4.0, 1.0, 0.5], [-4.0, 1.0, 0.5]])
def test_the_largest_eigenvalue(spectrum: list[float]) -> None:
    found = largest_eigenvalue(Matrix(symmetric(spectrum)))
    assert found == pytest.approx(4.0, rel=1e-9)
    assert found <= 4.0 * (1 + 1e-12)


def test_the_largest_eigenvalue_of_zero() -> None:
    operator = Matrix(torch.zeros(3, 3).double())
    assert largest_eigenvalue(operator) == 0.0
    assert operator.products == 1
