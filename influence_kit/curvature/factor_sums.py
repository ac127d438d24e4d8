"""A factor of a Kronecker product: a sum of outer products, or its diagonal if a side is long.

Shapes: g groups, s entries of a side, N summed rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from influence_kit.core.distributed import from_first_rank, sum_over_ranks
from influence_kit.curvature.passes import refuse_non_finite

# the longest side of a weight with eigenvectors, which form a matrix of that size squared
LARGEST_SIDE = 8192


class FactorSum:
    """The sum of x x^T over rows x, by group: ``[g, s, s]``, or its diagonal ``[g, s]``.

    Args:
        groups: the number g of groups.
        size: the number s of entries.
        sample: a tensor on the device.
        extra: the number of entries (a bias) that do not count towards the length of the side. A
            side longer than ``LARGEST_SIDE`` has only the diagonal, whose eigenvectors are the unit
            vectors.
    """

    def __init__(self, groups: int, size: int, sample: Tensor, extra: int = 0) -> None:
        self.is_diagonal = size - extra > LARGEST_SIDE
        shape = (groups, size) if self.is_diagonal else (groups, size, size)
        self.total = sample.new_zeros(shape, dtype=torch.float64)

    def add(self, columns: Tensor) -> None:
        """Add the rows, given as columns: ``[s, N]``, or by group ``[g, s, N]``."""
        if self.is_diagonal:
            # without copying the columns, which are long
            norms: Tensor = torch.linalg.vector_norm(columns, dim=-1)
            self.total += norms.double().square()
        else:
            self.total += columns @ columns.transpose(-1, -2)

    def reduce(self, count: Tensor | int) -> None:
        """Sum over ranks, and divide by a count."""
        self.total = sum_over_ranks(self.total) / count
        refuse_non_finite(self.total)

    def eigenpairs(self) -> tuple[Tensor, Tensor | None]:
        """Eigenvalues ``[g, s]`` and vectors ``[g, s, s]``, the same on all ranks."""
        if self.is_diagonal:
            return self.total, None
        values, vectors = torch.linalg.eigh(self.total)
        return values, from_first_rank(vectors.contiguous())
