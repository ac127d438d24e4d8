"""The damping by Laplace evidence, against the root of its equation found by bisection."""

import itertools
import math
from typing import Any

import pytest
import torch
from damping_oracle import root
from torch import Tensor

from influence_kit.curvature.evidence import evidence_damping
from influence_kit.curvature.observations import Observations
from influence_kit.errors import InvalidArgumentError

# shapes that the eigenvalues of a model may have: grids of matrices, tables, diagonals
SHAPES: list[list[tuple[int, ...]]] = [[(1,)], [(3, 4)], [(2, 5, 3), (7,), (1, 1)], [(40,), (0,)]]


def spectrum(shapes: list[tuple[int, ...]], orders: float, seed: int) -> list[Tensor]:
    """Eigenvalues over so many orders of magnitude, a third of them zero or negative."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for shape in shapes:
        exponents = torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5
        signs = torch.randint(-1, 5, shape, generator=generator).clamp(max=1)
        found.append(10 ** (exponents * orders) * signs)
    found[0].view(-1)[0] = 10 ** (orders / 4)  # one at least is positive
    return found


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("orders", [0, 3, 12, 40])
@pytest.mark.parametrize("values", [math.inf, 1e9, 5.0, 0.7])
def test_it_is_the_root(shapes: list[tuple[int, ...]], orders: float, values: float) -> None:
    """Where a variance is estimated there may be more parameters than values."""
    for seed in range(4):
        own = spectrum(shapes, orders, seed)
        every = torch.cat([part.flatten() for part in own])
        for squared_norm in (1e-12, 0.3, 1e10):
            for count in (1.0, 1e-8, 1e12):
                found = evidence_damping(own, squared_norm, Observations(count, values))
                expected = root(every, squared_norm, count, values)
                # where nearly as many parameters as values are determined, 1 - gamma / values is
                # rounded to a few digits
                close = 1e-10 if values > 100 else 1e-7
                assert found == pytest.approx(expected, rel=close, abs=0)


def test_one_eigenvalue_in_closed_form() -> None:
    """With eigenvalue e: e / (e + d) = N d s, quadratic in d."""
    e, squared_norm, n = torch.tensor(0.7, dtype=torch.float64), 2.0, 30.0
    expected = float((-e + (e**2 + 4 * e / (n * squared_norm)).sqrt()) / 2)
    found = evidence_damping([e], squared_norm, Observations(n))
    assert found == pytest.approx(expected, rel=1e-12)


def test_equal_eigenvalues_and_a_variance_in_closed_form() -> None:
    """With k equal ones e: N (1 - k e / ((e + d) v)) d s = k e / (e + d), quadratic in d."""
    k, e, squared_norm, count, values = 8, 0.5, 3.0, 20.0, 6.0
    scale = count * squared_norm * values
    a, b, c = scale, scale * e * (1 - k / values), -k * e * values
    expected = (-b + math.sqrt(b**2 - 4 * a * c)) / (2 * a)
    own = [torch.full((2, 4), e).double()]
    found = evidence_damping(own, squared_norm, Observations(count, values))
    assert found == pytest.approx(expected, rel=1e-11)


def test_it_falls_with_the_observations_and_the_weights_and_scales_with_the_loss() -> None:
    own = spectrum([(6, 5), (9,)], 8, 0)
    steps = [10.0**k for k in range(-6, 13)]
    for found in (
        [evidence_damping(own, 0.4, Observations(n)) for n in steps],
        [evidence_damping(own, n, Observations(50)) for n in steps],
        [evidence_damping(own, 0.4, Observations(n, 4.0)) for n in steps],
    ):
        assert all(later < earlier for earlier, later in itertools.pairwise(found))
    # a loss times 10: the curvature times 100, N by 100
    plain = evidence_damping(own, 0.4, Observations(50))
    scaled = evidence_damping([100 * part for part in own], 0.4, Observations(0.5))
    assert scaled == pytest.approx(100 * plain, rel=1e-12)


def test_zero_and_negative_eigenvalues_count_nothing() -> None:
    some = torch.tensor([2.0, 1e-3]).double()
    others = [some.reshape(1, 2, 1), -torch.ones(3, 2).double(), torch.zeros(5).double()]
    expected = evidence_damping([some], 0.4, Observations(9))
    assert evidence_damping(others, 0.4, Observations(9)) == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_it_is_given_stays(dtype: torch.dtype) -> None:
    given = torch.tensor([0.5, -1.0, 0.0], dtype=dtype, requires_grad=True)
    found = evidence_damping(iter([given]), 1.0, Observations(4))
    assert found == pytest.approx(root(torch.tensor([0.5]).double(), 1.0, 4, math.inf), rel=1e-10)
    assert given.tolist() == [0.5, -1.0, 0.0]


@pytest.mark.parametrize(
    ("eigenvalues", "squared_norm", "count", "match"),
    [
        ([0.0, -2.0], 1.0, 5.0, "no eigenvalue of the curvature is positive. Give a number"),
        ([], 1.0, 5.0, "no eigenvalue of the curvature is positive"),
        ([float("nan")], 1.0, 5.0, "no eigenvalue of the curvature is positive"),
        ([1.0], 0.0, 5.0, "all weights are zero. Give a number"),
        ([1.0], 1.0, math.inf, "the model's errors are all zero, and so is their variance. Give"),
        ([1.0], 1.0, 0.0, "the model's errors are all zero"),
        ([1.0], 1.0, math.nan, "the model's errors are all zero"),
    ],
)
def test_where_there_is_no_solution(
    eigenvalues: Any, squared_norm: float, count: float, match: str
) -> None:
    own = [torch.tensor(eigenvalues, dtype=torch.float64)]
    with pytest.raises(InvalidArgumentError, match=f"the evidence has no maximum: {match}"):
        evidence_damping(own, squared_norm, Observations(count))


def test_observations_of_a_training_set() -> None:
    facts = torch.tensor([16.0, 3.0]).double()
    assert Observations.of(facts, 10) == Observations(160.0, 30.0)
    facts[1] = math.inf
    assert Observations.of(facts, 10) == Observations(160.0)
