"""The mean of the inverses of damped rank-one curvatures: DataInf, arXiv 2310.00902."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from influence_kit.curvature.damping import DampingArgument
from influence_kit.curvature.fit_data import FitData
from influence_kit.curvature.inverse_curvature import InverseCurvature, State
from influence_kit.curvature.operator_inverses import BlockArgument
from influence_kit.curvature.passes import DataSet, Features, refuse_non_finite
from influence_kit.gradients.parameter_selection import choose_blocks
from influence_kit.gradients.per_example import Gradients, Transform
from influence_kit.operators.damping_by_block import Damping, damping_by_block
from influence_kit.operators.partition import Partition, spread


class MeanInverse:
    """v -> 1/n sum_j (g_j g_j^T + damping)^-1 v, block by block, in one pass for all vectors.

    By Sherman and Morrison each inverse is (I - g_j g_j^T / (damping + |g_j|^2)) / damping, so that
    the pass takes inner products and a weighted sum of the gradients, and stores none of them.

    Args:
        features: returns the gradients of a batch, given the indices of its examples.
        data: the data set.
        partition: the parameters, in blocks.
        damping: added to the eigenvalues; positive.
    """

    def __init__(
        self, features: Features, data: DataSet, partition: Partition, damping: Damping
    ) -> None:
        self.features, self.data, self.partition = features, data, partition
        self.damping = damping_by_block(damping, len(partition.blocks), positive=True)

    def __call__(self, vectors: Tensor) -> Tensor:
        """The mean of the inverses times each row of ``[k, P]``."""
        total = torch.zeros_like(vectors)
        for indices, batch in self.data:
            total += self._batch_sum(self.features(indices, batch), vectors)
        lift = spread(self.damping, self.partition.sizes).to(vectors.device)
        # in float64, in which the inverse of a very small damping exists
        left = vectors.double() - refuse_non_finite(total).double() / self.data.count
        return (left / lift).to(vectors)

    def _batch_sum(self, gradients: Gradients, vectors: Tensor) -> Tensor:
        """The sum over a batch of g_j <g_j, v> / (damping + |g_j|^2)."""
        tests = self.partition.gradients(vectors, gradients)
        columns: list[Tensor] = []
        for names, damping in zip(
            self.partition.blocks.values(), self.damping.tolist(), strict=True
        ):
            # in powers of two, g = 2^e b: g <g, v> / (damping + |g|^2) is the same of b with
            # damping / 4^e, and |b|^2 neither vanishes nor overflows
            own, squares, powers = gradients.of(names).balanced()
            weights = own.inner_of(tests, own.n, names)
            scale = damping * torch.exp2(-2 * powers.double()) + squares.double()
            weights = (weights.double() / scale).to(weights)
            columns += own.combined(weights, names).values()
        return torch.cat(columns, dim=1)


class MeanOfInverses(InverseCurvature):
    """The mean of the examples' damped inverses, not the inverse of their mean; see ``DataInf``.

    Args:
        damping: see ``InfluenceFunction``.
        seed: of all random numbers.
        blocks: "layer", "parameter", or names of parameters by block.
    """

    takes_own_labels = True

    def __init__(
        self,
        damping: DampingArgument = "auto",
        seed: int = 0,
        blocks: BlockArgument = "layer",
    ) -> None:
        super().__init__(damping, seed)
        self.blocks = blocks

    @property
    def couples_layers(self) -> bool:
        return self.blocks == "full"

    def blocks_of(self, model: nn.Module, names: Sequence[str]) -> Mapping[str, list[str]]:
        return choose_blocks(model, names, self.blocks)

    def traces(self, state: State, data: FitData) -> Tensor:
        features = data.features("empirical_fisher", self.seed)
        return mean_squared_norms(features, data.examples, data.partition)

    def inverse(self, state: State, damping: Tensor, data: FitData) -> Transform:
        features = data.features("empirical_fisher", self.seed)
        return data.through(MeanInverse(features, data.examples, data.partition, damping))


def mean_squared_norms(features: Features, data: DataSet, partition: Partition) -> Tensor:
    """The mean over examples of |g|^2 for each block, ``[B]``."""
    blocks: Sequence[Sequence[str]] = list(partition.blocks.values())
    total = torch.zeros(len(blocks), dtype=torch.float64)
    for indices, batch in data:
        gradients = features(indices, batch)
        for number, names in enumerate(blocks):
            _, squares, powers = gradients.of(names).balanced()
            total[number] += (squares.double() * torch.exp2(2 * powers.double())).sum().cpu()
    return refuse_non_finite(total) / data.count
