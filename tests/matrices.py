"""Matrices that are written out, as operators: what solvers are tested on."""

from collections.abc import Sequence

import torch
from torch import Tensor

from influence_kit.operators import Operator


class Matrix(Operator):
    """Dense blocks; ``products`` counts the calls, ``widths`` the vectors of each."""

    def __init__(self, *blocks: Tensor) -> None:
        super().__init__([len(block) for block in blocks], blocks[0])
        self.blocks = blocks
        self.widths: list[int] = []

    def product(self, vectors: Tensor) -> Tensor:
        self.widths.append(len(vectors))
        parts = zip(vectors.split(self.sizes, dim=1), self.blocks, strict=True)
        return torch.cat([part @ block for part, block in parts], dim=1)

    @property
    def products(self) -> int:
        return len(self.widths)

    def inverse(self, damping: float | Sequence[float] = 0.0) -> Tensor:
        """(C + damping)^-1, dense."""
        values = [damping] * len(self.blocks) if isinstance(damping, float) else damping
        damped = [
            block.double() + value * torch.eye(len(block)).double()
            for block, value in zip(self.blocks, values, strict=True)
        ]
        return torch.linalg.inv(torch.block_diag(*damped))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def symmetric(eigenvalues: Sequence[float], seed: int = 0) -> Tensor:
    """A matrix of these eigenvalues, with random eigenvectors."""
    values = torch.tensor(eigenvalues, dtype=torch.float64)
    basis = torch.linalg.qr(normal(len(values), len(values), seed=seed))[0]
    return (basis * values) @ basis.T
