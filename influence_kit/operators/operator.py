"""A symmetric matrix that is given by its products with vectors.

Shapes: k vectors, P rows of the matrix, B blocks on its diagonal.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from influence_kit.core.arguments import check_count, check_seed, shown
from influence_kit.core.memory import rows_within, workspace_bytes
from influence_kit.errors import InvalidArgumentError
from influence_kit.operators.checks import check_blocks, is_dense

# how many probes the Hutchinson estimates of traces and diagonals use
PROBES = 32
MOST_PROBES = 2**20
# blocks of at most this many rows are written out to compute their trace
SMALL = 256


class Operator(ABC):
    """A symmetric block-diagonal matrix.

    Args:
        sizes: the number of rows of each block.
        sample: a tensor with the dtype and device of vectors.
    """

    def __init__(self, sizes: Sequence[int], sample: Tensor) -> None:
        blocks = check_blocks(sizes, "sizes", "numbers of rows, of each block")
        self.sizes = [check_count(s, f"sizes[{n}]", most=2**62) for n, s in enumerate(blocks)]
        if not is_dense(sample) or not sample.is_floating_point():
            raise InvalidArgumentError(
                "`sample` must be a tensor with the dtype and device of vectors, floats; got "
                f"{shown(sample)}"
            )
        self.sample = sample

    @abstractmethod
    def product(self, vectors: Tensor) -> Tensor:
        """The matrix times each vector, ``[k, P]`` to ``[k, P]``."""

    @property
    def size(self) -> int:
        """The number of rows P."""
        return sum(self.sizes)

    def dense(self) -> list[Tensor]:
        """The blocks, written out, in float64."""
        blocks = [self.sample.new_zeros(size, size, dtype=torch.float64) for size in self.sizes]
        step = rows_within(4 * workspace_bytes(self.sample.device), 8 * self.size)
        for start in range(0, max(self.sizes), step):
            # one unit vector of every block at a time
            stop = min(start + step, max(self.sizes))
            units = torch.cat(
                [torch.eye(stop, size, dtype=torch.float64)[start:] for size in self.sizes], dim=1
            ).to(self.sample)
            columns = self.product(units).double().split(self.sizes, dim=1)
            for block, part in zip(blocks, columns, strict=True):
                block[start:stop] = part[: max(0, len(block) - start)]
        return [(block + block.T) / 2 for block in blocks]

    def diagonal(self, seed: int = 0) -> Tensor:
        """An unbiased estimate of the diagonal ``[P]`` by probes of random signs."""
        probes = self.signs(PROBES, seed)
        return (probes * self.product(probes)).double().mean(0)

    def traces(self, seed: int = 0) -> Tensor:
        """The trace of each block ``[B]``: exact for small blocks, else estimated by probes."""
        if max(self.sizes) <= SMALL:
            return torch.stack([block.trace() for block in self.dense()])
        return torch.stack([part.sum() for part in self.diagonal(seed).split(self.sizes)])

    def normal(self, count: int, seed: int) -> Tensor:
        """Random normal vectors, the same on every device."""
        generator = torch.Generator().manual_seed(check_seed(seed))
        shape = (check_count(count, "count", most=MOST_PROBES), self.size)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.sample)

    def signs(self, count: int, seed: int) -> Tensor:
        """Random signs, the same on every device."""
        return torch.where(self.normal(count, seed) >= 0, 1.0, -1.0).to(self.sample)


class Scaled(Operator):
    """A number times an operator.

    Args:
        operator: the operator.
        factor: the number.
    """

    def __init__(self, operator: Operator, factor: float) -> None:
        super().__init__(operator.sizes, operator.sample)
        self.operator, self.factor = operator, factor

    def product(self, vectors: Tensor) -> Tensor:
        return self.operator.product(vectors) * self.factor


def check_operator(operator: Any) -> Operator:
    """The argument, which must be an ``Operator``.

    Raises:
        InvalidArgumentError: for anything else, also a matrix.
    """
    if not isinstance(operator, Operator):
        raise InvalidArgumentError(
            "`operator` must be an influence_kit.operators.Operator, as `hessian`, `gauss_newton` "
            f"and `fisher` return it; got {shown(operator)}"
        )
    return operator


def check_vectors(vectors: Any, size: int) -> Tensor:
    """The argument, which must be dense real vectors ``[k, P]`` for an operator of that size.

    Raises:
        InvalidArgumentError: for anything else.
    """
    if not is_dense(vectors) or not vectors.is_floating_point():
        raise InvalidArgumentError(
            f"`vectors` must be a tensor [k, {size}] of floats; got {shown(vectors)}"
        )
    if vectors.dim() != 2 or vectors.shape[1] != size:
        raise InvalidArgumentError(
            f"`vectors` must have shape [k, {size}]; got {list(vectors.shape)}"
        )
    found: Tensor = vectors
    return found
