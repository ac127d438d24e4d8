"""The mean over a data set of outer products of gradients: the Fisher matrix, empirical or not.

Shapes: n examples, k vectors, P elements of all blocks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from influence_kit.core.distributed import sum_over_ranks
from influence_kit.curvature.curvature import Curvature
from influence_kit.curvature.passes import DataSet, Features, refuse_non_finite
from influence_kit.data.batches import Batch
from influence_kit.data.loaders import loader_length
from influence_kit.operators.block import Block
from influence_kit.operators.partition import Partition


class OuterProducts(Curvature):
    """C_j = g_j g_j^T: the empirical Fisher for gradients at the labels of the data.

    An estimate of the Fisher for gradients at labels, or slopes, sampled from the model.

    Args:
        features: returns the gradients g of a batch, given the indices of its examples.
        data, partition, sample: as in ``Curvature``.
    """

    def __init__(
        self, features: Features, data: DataSet, partition: Partition, sample: Tensor
    ) -> None:
        super().__init__(data, partition, sample)
        self.features = features

    def batch_product(self, indices: Tensor, batch: Batch, vectors: Tensor) -> Tensor:
        gradients = self.features(indices, batch)
        tests = self.partition.gradients(vectors, gradients)
        columns: list[Tensor] = []
        for names in self.partition.blocks.values():
            weights = gradients.inner_of(tests, gradients.n, names)
            columns += gradients.combined(weights, names).values()
        return torch.cat(columns, dim=1)

    @property
    def core_sizes(self) -> list[int]:
        """The number of examples for blocks with at least twice as many entries, else the entries.

        For those blocks, storing the gradients, decomposing their Gram matrix and multiplying by
        its inverse are all cheaper than with the block as a matrix.
        """
        length = loader_length(getattr(self.data.batches, "dataset", None))
        n = self.data.count if length is None else length
        return [n if 2 * n <= size else size for size in self.sizes]

    def blocks(self) -> list[Block]:
        return self._gathered(
            [
                _GradientRows(size, self.sample)
                if core < size
                else _OuterProductSum(size, self.sample)
                for core, size in zip(self.core_sizes, self.sizes, strict=True)
            ]
        )

    def dense(self) -> list[Tensor]:
        summed = [_OuterProductSum(size, self.sample) for size in self.sizes]
        return [block.core for block in self._gathered(summed)]

    def _gathered(self, gathered: "Sequence[_GradientRows | _OuterProductSum]") -> list[Block]:
        """The blocks, in one pass over the data."""
        for indices, batch in self.data.of_this_rank():
            rows = self.partition.flat(self.features(indices, batch)).split(self.sizes, dim=1)
            for one, own in zip(gathered, rows, strict=True):
                one.add(indices, own)
        blocks = [one.block(self.data.count) for one in gathered]
        for block in blocks:
            refuse_non_finite(block.core)
        return blocks

    def diagonal(self, seed: int = 0) -> Tensor:
        total = self.sample.new_zeros(self.size, dtype=torch.float64)
        for indices, batch in self.data.of_this_rank():
            total += self.partition.flat(self.features(indices, batch)).square().sum(0)
        return refuse_non_finite(sum_over_ranks(total)) / self.data.count


class _OuterProductSum:
    """The sum of the outer products of gradients."""

    def __init__(self, size: int, sample: Tensor) -> None:
        self.total = sample.new_zeros(size, size, dtype=torch.float64)

    def add(self, indices: Tensor, rows: Tensor) -> None:
        exact = rows.double()
        self.total.addmm_(exact.T, exact)

    def block(self, n: int) -> Block:
        return Block(sum_over_ranks(self.total) / n)


class _GradientRows:
    """The gradients themselves, one row per example."""

    def __init__(self, size: int, sample: Tensor) -> None:
        self.size, self.sample = size, sample
        self.parts: list[tuple[Tensor, Tensor]] = []

    def add(self, indices: Tensor, rows: Tensor) -> None:
        # not a view of the rows of all blocks
        self.parts.append((indices, rows.clone()))

    def block(self, n: int) -> Block:
        rows = self.sample.new_zeros(n, self.size)
        for indices, own in self.parts:
            rows[indices] = own
        self.parts.clear()
        return Block.of_rows(sum_over_ranks(rows))
