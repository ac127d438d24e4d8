"""Inverse curvatures from products of the curvature with vectors.

Explicit (Cholesky factors) and the Nystroem approximation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from influence_kit.core.arguments import check_count, shown
from influence_kit.core.memory import free_bytes
from influence_kit.core.objects import is_one_of
from influence_kit.curvature.curvature import Curvature, GaussNewton, HessianOfLoss
from influence_kit.curvature.damping import LEARNING_RATES, MEAN, TRACE, DampingArgument
from influence_kit.curvature.fit_data import FitData
from influence_kit.curvature.inverse_curvature import (
    InverseCurvature,
    State,
    refuse_all_but_gradients,
)
from influence_kit.curvature.outer_products import OuterProducts
from influence_kit.curvature.sampled_slopes import settings_of
from influence_kit.errors import InvalidArgumentError
from influence_kit.gradients.feature_map import FeatureMap
from influence_kit.gradients.parameter_selection import choose_blocks
from influence_kit.gradients.per_example import Transform
from influence_kit.operators.block import Block
from influence_kit.operators.low_rank import (
    LowRank,
    as_tensors,
    from_tensors,
    nystrom,
)
from influence_kit.operators.solvers import Cholesky

CurvatureName = Literal["ggn", "hessian", "fisher", "empirical_fisher"]
BlockArgument = Literal["full", "layer", "parameter"] | Mapping[str, Sequence[str]]
CURVATURES = ("ggn", "hessian", "fisher", "empirical_fisher")


class OperatorInverse(InverseCurvature):
    """The inverse of a curvature with a choice of blocks.

    Args:
        damping: see ``InfluenceFunction``.
        curvature: "ggn" (Gauss-Newton, J^T H J: the Hessian for models that are linear in their
            parameters, and never negative for a loss that is convex in the outputs), "hessian" (may
            be indefinite away from a minimum), "fisher" (J^T H J again, estimated by outer products
            of gradients at sampled slopes; see ``KFACInfluenceFunction``) or "empirical_fisher"
            (outer products of gradients at the labels of the data).
        blocks: "full", "layer", "parameter", or names of parameters by block: entries of C between
            blocks are taken as zero, and parameters in no block as frozen.
        seed: the seed of all random numbers.
    """

    # works for convex models and for networks
    auto_rule, auto_share = TRACE, 1.0
    rules: Sequence[str] = (MEAN, TRACE, LEARNING_RATES)

    def __init__(
        self,
        damping: DampingArgument = "auto",
        curvature: CurvatureName = "ggn",
        blocks: BlockArgument = "full",
        seed: int = 0,
    ) -> None:
        if not is_one_of(curvature, list(CURVATURES)):
            raise InvalidArgumentError(
                f"`curvature` must be one of {', '.join(CURVATURES)}; got {shown(curvature)}"
            )
        super().__init__(damping, seed)
        self.curvature = curvature
        self.blocks = blocks

    @property
    def settings(self) -> dict[str, Any]:
        own = {"curvature": self.curvature, **settings_of(self.curvature)}
        return {**super().settings, **own}

    @property
    def takes_own_labels(self) -> bool:
        return self.curvature == "empirical_fisher"

    @property
    def couples_layers(self) -> bool:
        return self.blocks == "full"

    def blocks_of(self, model: nn.Module, names: Sequence[str]) -> Mapping[str, list[str]]:
        return choose_blocks(model, names, self.blocks)

    def check_features(self, features: FeatureMap) -> None:
        if self.curvature in ("ggn", "hessian"):
            refuse_all_but_gradients(features, f'curvature="{self.curvature}"')

    def operator(self, data: FitData) -> Curvature:
        """The curvature at the checkpoint that is in the model."""
        if self.curvature in ("ggn", "hessian"):
            kind = GaussNewton if self.curvature == "ggn" else HessianOfLoss
            return kind(data.source, data.loss, data.examples, data.partition, data.sample)
        features = data.features(self.curvature, self.seed)
        return OuterProducts(features, data.examples, data.partition, data.sample)

    def traces(self, state: State, data: FitData) -> Tensor:
        return self.operator(data).traces(self.seed)


class Explicit(OperatorInverse):
    """Computed as a matrix and factorized, block by block; see ``ExplicitInfluenceFunction``."""

    def fit(self, data: FitData) -> State:
        state = {}
        for number, block in enumerate(self.blocks_at(data)):
            state[f"curvature.{number}"] = block.core
            if block.rows is not None:
                state[f"rows.{number}"] = block.rows
        return state

    def blocks_at(self, data: FitData) -> list[Block]:
        """The blocks of the curvature at the checkpoint that is in the model."""
        return blocks_within_memory(self.operator(data))

    def traces(self, state: State, data: FitData) -> Tensor:
        return torch.stack([block.core.diagonal().sum() for block in _blocks(state, data)])

    def inverse(self, state: State, damping: Tensor, data: FitData) -> Transform:
        names = list(data.partition.blocks)
        return data.through(Cholesky(_blocks(state, data), damping, names))


def _blocks(state: State, data: FitData) -> list[Block]:
    numbers = range(len(data.partition.blocks))
    return [Block(state[f"curvature.{i}"], state.get(f"rows.{i}")) for i in numbers]


def blocks_within_memory(curvature: Curvature) -> list[Block]:
    """The blocks of a curvature; an error if they do not fit in memory."""
    _check_memory(curvature)
    return curvature.blocks()


def _check_memory(curvature: Curvature) -> None:
    sizes, cores = curvature.sizes, curvature.core_sizes
    rows = sum(core * size for core, size in zip(cores, sizes, strict=True) if core < size)
    # the decomposed matrices, their factors, and one more during the decomposition
    need = 8 * (2 * sum(core**2 for core in cores) + max(cores) ** 2 + rows)
    free = free_bytes(curvature.sample.device)
    if need > free:
        raise InvalidArgumentError(
            f"blocks of up to {max(sizes)} parameters take {need / 2**30:.1f} GiB as "
            f'matrices; {free / 2**30:.1f} GiB are free. Use blocks="layer", `layers`, or '
            "`EKFACInfluenceFunction` or `CGInfluenceFunction`, which form no such matrix"
        )


class Nystrom(OperatorInverse):
    """A few eigenpairs from random directions; see ``NystromInfluenceFunction``.

    Args:
        damping, curvature, blocks, seed: as in ``OperatorInverse``.
        rank: the number of directions per block (all directions of a smaller block).
    """

    def __init__(
        self,
        damping: DampingArgument = "auto",
        curvature: CurvatureName = "ggn",
        blocks: BlockArgument = "full",
        seed: int = 0,
        rank: int = 100,
    ) -> None:
        super().__init__(damping, curvature, blocks, seed)
        self.rank = check_count(rank, "rank")

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "rank": self.rank}

    def fit(self, data: FitData) -> State:
        return as_tensors(nystrom(self.operator(data), self.rank, self.seed))

    def inverse(self, state: State, damping: Tensor, data: FitData) -> Transform:
        pairs = from_tensors(state, len(data.partition.blocks))
        return data.through(LowRank(pairs, damping, complement=True))
