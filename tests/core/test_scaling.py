"""Powers of two keep squares within what floating point holds, and round nothing."""

import pytest
import torch

from influence_kit.core.scaling import balanced, exponents, times_powers, unit_rows

ROWS = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
EXTREMES = [
    (torch.float32, 1e-25),
    (torch.float32, 1e-37),
    (torch.float32, 1e25),
    (torch.float32, 1e37),
    (torch.float64, 1e-250),
    (torch.float64, 1e250),
]
extremes = pytest.mark.parametrize(("dtype", "scale"), EXTREMES)


def row_norms(rows: torch.Tensor) -> torch.Tensor:
    some, powers = balanced(rows)
    return times_powers(torch.linalg.vector_norm(some, dim=1), powers)


@extremes
def test_norms_of_very_small_and_very_large_rows(dtype: torch.dtype, scale: float) -> None:
    rows = ROWS.to(dtype)
    expected = torch.linalg.vector_norm(rows, dim=1)
    tolerance = 4 * torch.finfo(dtype).eps
    assert torch.allclose(row_norms(rows * scale) / scale, expected, tolerance, 0)
    assert torch.allclose(unit_rows(rows * scale), rows / expected[:, None], 2e-5, 0)


@extremes
def test_balanced_rows_are_the_same_numbers(dtype: torch.dtype, scale: float) -> None:
    rows = torch.cat([ROWS.to(dtype) * scale, ROWS.to(dtype)])
    some, powers = balanced(rows)
    assert bool(torch.isfinite(some.square()).all())
    assert bool((some.square().sum(1) > 0).all())
    assert torch.equal(times_powers(some, powers), rows)
    assert powers[5:].tolist() == [0] * 5


def test_usual_numbers_are_left_as_they_are() -> None:
    assert balanced(ROWS)[0] is ROWS
    zero = torch.zeros(2, 3)
    assert balanced(zero)[0] is zero
    assert row_norms(zero).tolist() == [0, 0]
    assert torch.equal(unit_rows(zero), zero)


def test_what_is_not_finite_has_no_power() -> None:
    rows = torch.tensor([[torch.nan, 1e-30], [torch.inf, 1.0], [1e-30, 0.0]])
    assert exponents(rows).tolist() == [0, 0, -99]
    assert torch.isnan(row_norms(rows)[0])
    assert torch.isinf(row_norms(rows)[1])
