"""Powers of two that keep squares, and sums of squares, within what floating point holds.

The square of 1e-25 is 0 in float32 and that of 1e25 infinite, though both norms exist. Numbers
beyond a limit are divided by a power of two, which rounds nothing, and the norm multiplied by it
afterwards. Numbers within the limits are left as they are.
"""

from typing import Protocol, TypeVar

import torch
from torch import Tensor


class Scalable(Protocol):
    """Rows, in whatever form, that can be multiplied by a factor each."""

    def scaled(self: "Rows", factors: Tensor) -> "Rows":
        """Each row times its factor ``[n]``."""


Rows = TypeVar("Rows", bound=Scalable)
# exponents within which products of four numbers, and sums of many, neither vanish nor overflow
LIMITS = {torch.float32: 16, torch.float64: 192}


def exponents(values: Tensor) -> Tensor:
    """The power of two of each row's largest number, where that is beyond the limits, else 0.

    Args:
        values: ``[n, ...]``; zeros, NaN and infinities have the exponent 0.

    Returns:
        ``[n]``, in the dtype of the values.
    """
    rows = values.detach().reshape(len(values), -1)
    if not rows.shape[1]:
        return values.new_zeros(len(values))
    # several times as fast as the largest numbers, which are wanted where a norm is unusual
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    limit = 2.0 ** LIMITS.get(values.dtype, 0)
    if bool(((norms > 1 / limit) & (norms < limit)).all()):
        return values.new_zeros(len(values))
    return powers_of(rows.abs().amax(dim=1))


def powers_of(largest: Tensor) -> Tensor:
    """The power of two of each number that is not negative, where it is beyond the limits."""
    powers = torch.frexp(largest).exponent.to(largest.dtype)
    usual = powers.abs() <= LIMITS.get(largest.dtype, 0)
    return powers.masked_fill(usual | (largest == 0) | ~torch.isfinite(largest), 0)


def times_powers(values: Tensor, powers: Tensor) -> Tensor:
    """Each row ``[n, ...]`` times two to its power ``[n]``: the same tensor where all are 0."""
    if not bool(powers.any()):
        return values
    shape = [-1] + [1] * (values.dim() - 1)
    for factors in _factors(powers):
        values = values * factors.view(shape)
    return values


def scaled_by_powers(rows: Rows, powers: Tensor) -> Rows:
    """The same of rows in whatever form."""
    if bool(powers.any()):
        for factors in _factors(powers):
            rows = rows.scaled(factors)
    return rows


def _factors(powers: Tensor) -> tuple[Tensor, Tensor]:
    """Two factors: 2^150 is infinite in float32, and 2^-150 is 0."""
    first = (powers / 2).trunc()
    return torch.exp2(first), torch.exp2(powers - first)


def balanced(values: Tensor) -> tuple[Tensor, Tensor]:
    """Rows ``[n, ...]`` whose squares exist, and the powers of two ``[n]`` to multiply them by."""
    powers = exponents(values)
    return times_powers(values, -powers), powers


def row_norms(values: Tensor) -> Tensor:
    """The Euclidean norm of each row of ``[n, d]``, also of very small or very large ones.

    Example:
        >>> row_norms(torch.tensor([[3e-30, 4e-30], [3e30, 4e30]]))
        tensor([5.0000e-30, 5.0000e+30])
    """
    rows, powers = balanced(values)
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return times_powers(norms, powers)


def unit_rows(values: Tensor) -> Tensor:
    """Each row of ``[n, d]`` over its norm; a zero row stays zero."""
    rows, _ = balanced(values)
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return rows / norms.masked_fill(norms == 0, 1)[:, None]
