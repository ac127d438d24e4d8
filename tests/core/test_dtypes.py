"""Dtypes of scores, and complex numbers as pairs of real ones."""

import pytest
import torch
from torch import nn

from influence_kit.core.dtypes import exact, exact_dtype, has_complex, real, real_shape, restored


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.complex32, torch.float32),
        (torch.complex64, torch.float32),
        (torch.complex128, torch.float64),
    ],
)
def test_sums_are_real_and_not_in_half_precision(dtype: torch.dtype, expected: torch.dtype) -> None:
    assert exact_dtype(dtype) == expected


def test_half_precision_is_taken_as_float32() -> None:
    values = torch.ones(2, dtype=torch.bfloat16)
    assert exact(values).dtype == torch.float32
    assert exact(values.double()).dtype == torch.float64


def test_complex_numbers_are_pairs() -> None:
    values = torch.tensor([1 + 2j, 3 - 4j])
    assert real(values.conj()).tolist() == [[1, -2], [3, 4]]
    assert real_shape(values) == torch.Size([2, 2])
    assert torch.equal(restored(real(values), values), values)
    plain = torch.ones(3)
    assert real(plain) is plain
    assert restored(plain, plain) is plain
    assert real_shape(plain) == torch.Size([3])
    assert (real(values) * real(values)).sum() == (values.conj() * values).sum().real


def test_layers_with_complex_parameters() -> None:
    assert has_complex(nn.Linear(2, 2, dtype=torch.cfloat))
    assert not has_complex(nn.Linear(2, 2))
    assert not has_complex(nn.Sequential(nn.Linear(2, 2, dtype=torch.cfloat)))
