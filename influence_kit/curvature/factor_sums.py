"""A factor of a Kronecker product: a sum of outer products, or its diagonal where a side is long.

Shapes: g groups, s entries of a side, N rows that are added up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from influence_kit.core.distributed import from_first_rank, sum_over_ranks
from influence_kit.curvature.passes import refuse_non_finite

# the longest side of a weight that has eigenvectors, whose matrix has the square of it entries
LARGEST_SIDE = 8192


class FactorSum:
    """The sum of x x^T over rows x, by group: ``[g, s, s]``, or its diagonal ``[g, s]``.

    Args:
        groups: g.
        size: s.
        sample: a tensor on the device.
        extra: how many of the entries (a bias) do not count to the length of the side. One longer
            than ``LARGEST_SIDE`` has its diagonal alone, whose eigenvectors are the unit vectors.
    """

    def __init__(self, groups: int, size: int, sample: Tensor, extra: int = 0) -> None:
        self.is_diagonal = size - extra > LARGEST_SIDE
        shape = (groups, size) if self.is_diagonal else (groups, size, size)
        self.total = sample.new_zeros(shape, dtype=torch.float64)

    def add(self, columns: Tensor) -> None:
        """Add rows that stand as columns, ``[s, N]`` or by group ``[g, s, N]``."""
        if self.is_diagonal:
            # without a copy of the columns, which are long
            norms: Tensor = torch.linalg.vector_norm(columns, dim=-1)
            self.total += norms.double().square()
        else:
            self.total += columns @ columns.transpose(-1, -2)

    def reduce(self, count: Tensor | int) -> None:
        """Divide by a count once all ranks have added their rows."""
        self.total = sum_over_ranks(self.total) / count
        refuse_non_finite(self.total)

    def eigenpairs(self) -> tuple[Tensor, Tensor | None]:
        """Eigenvalues ``[g, s]`` and vectors ``[g, s, s]``, the same on all ranks."""
        if self.is_diagonal:
            return self.total, None
        values, vectors = torch.linalg.eigh(self.total)
        return values, from_first_rank(vectors.contiguous())
