"""Powers of two that keep squares, and sums of squares, within the range of floating point.

The square of 1e-25 is 0 in float32 and that of 1e25 is infinite, though both norms exist. Numbers
beyond a limit are divided by a power of two, which rounds nothing, and the norm is multiplied by it
afterwards. Numbers within the limits are left unchanged.
"""

from typing import Protocol, TypeVar

import torch
from torch import Tensor


class Scalable(Protocol):
    """Rows, in any form, each of which can be multiplied by its own factor."""

    def scaled(self: "Rows", factors: Tensor) -> "Rows":
        """Each row times its factor ``[n]``."""


Rows = TypeVar("Rows", bound=Scalable)
# exponents within which products of four numbers, and sums of many, neither vanish nor overflow
LIMITS = {torch.float32: 16, torch.float64: 192}


def exponents(values: Tensor) -> Tensor:
    """The power of two of each row's largest number if that is beyond the limits, else 0.

    Args:
        values: ``[n, ...]``; zeros, NaN and infinities have the exponent 0.

    Returns:
        ``[n]``, in the dtype of the values.
    """
    rows = values.detach().reshape(len(values), -1)
    if not rows.shape[1]:
        return values.new_zeros(len(values))
    # norms are several times faster than maxima, which are only needed if a norm is unusual
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    limit = 2.0 ** LIMITS.get(values.dtype, 0)
    if bool(((norms > 1 / limit) & (norms < limit)).all()):
        return values.new_zeros(len(values))
    return powers_of(rows.abs().amax(dim=1))


def powers_of(largest: Tensor) -> Tensor:
    """The power of two of each non-negative number that is beyond the limits, else 0."""
    powers = torch.frexp(largest).exponent.to(largest.dtype)
    usual = powers.abs() <= LIMITS.get(largest.dtype, 0)
    return powers.masked_fill(usual | (largest == 0) | ~torch.isfinite(largest), 0)


def times_powers(values: Tensor, powers: Tensor) -> Tensor:
    """Each row ``[n, ...]`` times two to its power ``[n]``: the same tensor if all powers are 0."""
    if not bool(powers.any()):
        return values
    shape = [-1] + [1] * (values.dim() - 1)
    for factors in _factors(powers):
        values = values * factors.view(shape)
    return values


def scaled_by_powers(rows: Rows, powers: Tensor) -> Rows:
    """``times_powers`` for rows in any form."""
    if bool(powers.any()):
        for factors in _factors(powers):
            rows = rows.scaled(factors)
    return rows


def _factors(powers: Tensor) -> tuple[Tensor, Tensor]:
    """Two factors with the product 2^power: 2^150 is infinite in float32, and 2^-150 is 0."""
    first = (powers / 2).trunc()
    return torch.exp2(first), torch.exp2(powers - first)


def balanced(values: Tensor) -> tuple[Tensor, Tensor]:
    """Rows ``[n, ...]`` whose squares exist, and the powers of two ``[n]`` to multiply them by."""
    powers = exponents(values)
    return times_powers(values, -powers), powers


def unit_rows(values: Tensor) -> Tensor:
    """Each row of ``[n, d]`` divided by its norm; a zero row stays zero."""
    rows, _ = balanced(values)
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return rows / norms.masked_fill(norms == 0, 1)[:, None]
