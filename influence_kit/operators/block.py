"""A symmetric matrix to invert: written out, or given by n rows whose outer products it averages.

Shapes: n examples, P rows of the matrix C, k vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from influence_kit.core.memory import rows_within, workspace_bytes
from influence_kit.operators.indefinite import indefinite


@dataclass(frozen=True)
class Block:
    """C ``[P, P]``: ``Block(C)``, or ``Block.of_rows(G)`` for the mean G^T G / n of outer products.

    Args:
        core: C itself; with ``rows`` the Gram matrix G G^T / n, ``[n, n]``, which has the non-zero
            eigenvalues of C, and its trace.
        rows: G ``[n, P]``.
    """

    core: Tensor
    rows: Tensor | None = None

    @staticmethod
    def of_rows(rows: Tensor) -> Block:
        """The mean of the outer products of the rows ``[n, P]``, which is never formed."""
        core = rows.new_zeros(len(rows), len(rows), dtype=torch.float64)
        for some in _pieces(rows):
            core.addmm_(some, some.T)
        return Block(core / len(rows), rows)

    @property
    def size(self) -> int:
        """The number of rows P."""
        return len(self.core) if self.rows is None else self.rows.shape[1]

    def inverse(self, damping: float) -> Callable[[Tensor], Tensor]:
        """(C + damping)^-1 times vectors ``[k, P]`` in float64, by the Cholesky factor of the core.

        Args:
            damping: added to the eigenvalues of C.

        Raises:
            IndefiniteBlockError: if the damped block is singular or has negative eigenvalues.
        """
        factor = self._factor(damping)
        if self.rows is None:
            return partial(_solved, factor)
        return partial(_through_rows, factor, self.rows, damping)

    def _factor(self, damping: float) -> Tensor:
        """The Cholesky factor of the damped core."""
        damped = self.core.double().clone()
        damped.diagonal().add_(damping)
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(damped)
        # a singular matrix may pass because of rounding, and its inverse would be noise
        rounding = self.size * torch.finfo(damped.dtype).eps * damped.diagonal().max()
        least = factor.diagonal().min() ** 2
        if self.size > len(damped):
            least = least.clamp(max=damping)
        if failed or least <= rounding:
            raise indefinite(self._eigenvalues(), damping)
        return factor

    def _eigenvalues(self) -> Tensor:
        values = torch.linalg.eigvalsh(self.core.double())
        # the eigenvalues of directions outside the rows
        return torch.cat([values, values.new_zeros(self.size - len(values))])


def _solved(factor: Tensor, vectors: Tensor) -> Tensor:
    solved: Tensor = torch.cholesky_solve(vectors.T, factor).T
    return solved


def _through_rows(factor: Tensor, rows: Tensor, damping: float, vectors: Tensor) -> Tensor:
    """(v - G^T (G G^T / n + damping)^-1 G v / n) / damping (Woodbury)."""
    parts = vectors.split(_step(rows), dim=1)
    products = vectors.new_zeros(len(vectors), len(rows))
    for part, some in zip(parts, _pieces(rows), strict=True):
        products.addmm_(part, some.T)
    weights = _solved(factor, products) / len(rows)
    pieces = zip(parts, _pieces(rows), strict=True)
    return torch.cat([part - weights @ some for part, some in pieces], dim=1) / damping


def _pieces(rows: Tensor) -> Iterator[Tensor]:
    """The rows in float64, some columns at a time."""
    return (some.double() for some in rows.split(_step(rows), dim=1))


def _step(rows: Tensor) -> int:
    """How many columns of the rows fit the workspace."""
    return rows_within(4 * workspace_bytes(rows.device), 8 * len(rows))
