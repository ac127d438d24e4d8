"""Inverse curvatures from products of the curvature with vectors.

Explicit (Cholesky factors), conjugate gradients, and the Nystroem approximation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from influence_kit.core.arguments import check_count, check_number, shown
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
from influence_kit.errors import InvalidArgumentError
from influence_kit.gradients.feature_map import FeatureMap
from influence_kit.gradients.parameter_selection import choose_blocks
from influence_kit.gradients.per_example import Transform
from influence_kit.operators.block import Block
from influence_kit.operators.low_rank import (
    JacobiPreconditioner,
    LowRank,
    NystromPreconditioner,
    as_tensors,
    from_tensors,
    nystrom,
)
from influence_kit.operators.solvers import Cholesky, Solve, conjugate_gradients

CurvatureName = Literal["ggn", "hessian", "fisher", "empirical_fisher"]
BlockArgument = Literal["full", "layer", "parameter"] | Mapping[str, Sequence[str]]
CURVATURES = ("ggn", "hessian", "fisher", "empirical_fisher")
# the rank of the Nystroem preconditioner
RANK = 50


class OperatorInverse(InverseCurvature):
    """The inverse of a curvature with a choice of blocks.

    Args:
        damping: see ``InfluenceFunction``.
        curvature: "ggn" (Gauss-Newton, J^T H J: the Hessian for models that are linear in their
            parameters, and never negative for a loss that is convex in the outputs), "hessian" (may
            be indefinite away from a minimum), "fisher" (outer products of gradients at labels
            sampled from the model) or "empirical_fisher" (at the labels of the data).
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
        return {**super().settings, "curvature": self.curvature}

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
        curvature = self.operator(data)
        _check_memory(curvature)
        state = {}
        for number, block in enumerate(curvature.blocks()):
            state[f"curvature.{number}"] = block.core
            if block.rows is not None:
                state[f"rows.{number}"] = block.rows
        return state

    def traces(self, state: State, data: FitData) -> Tensor:
        return torch.stack([block.core.diagonal().sum() for block in _blocks(state, data)])

    def inverse(self, state: State, damping: Tensor, data: FitData) -> Transform:
        names = list(data.partition.blocks)
        return data.through(Cholesky(_blocks(state, data), damping, names))


def _blocks(state: State, data: FitData) -> list[Block]:
    numbers = range(len(data.partition.blocks))
    return [Block(state[f"curvature.{i}"], state.get(f"rows.{i}")) for i in numbers]


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


class ConjugateGradients(OperatorInverse):
    """Solves for all vectors together, one pass per iteration; see ``CGInfluenceFunction``.

    Args:
        damping, curvature, blocks, seed: as in ``OperatorInverse``.
        max_iter: the largest number of iterations.
        tol: a vector is done when the norm of its residual, relative to that of its right-hand
            side, is at most this.
        preconditioner: None, "jacobi" (the diagonal of C) or "nystrom" (50 eigenpairs of C).
    """

    def __init__(
        self,
        damping: DampingArgument = "auto",
        curvature: CurvatureName = "ggn",
        blocks: BlockArgument = "full",
        seed: int = 0,
        max_iter: int = 100,
        tol: float = 1e-6,
        preconditioner: Literal["jacobi", "nystrom"] | None = None,
    ) -> None:
        super().__init__(damping, curvature, blocks, seed)
        if not is_one_of(preconditioner, (None, "jacobi", "nystrom")):
            raise InvalidArgumentError(
                f'`preconditioner` must be None, "jacobi" or "nystrom"; got {shown(preconditioner)}'
            )
        self.max_iter = check_count(max_iter, "max_iter")
        self.tol = check_number(tol, "tol", least=0, below=1)
        self.preconditioner = preconditioner

    def inverse(self, state: State, damping: Tensor, data: FitData) -> Transform:
        operator = self.operator(data)
        conditioner: Solve | None = None
        if self.preconditioner == "jacobi":
            conditioner = JacobiPreconditioner(operator, damping, self.seed)
        elif self.preconditioner == "nystrom":
            conditioner = NystromPreconditioner(operator, damping, RANK, self.seed)
        solve = partial(
            conjugate_gradients,
            operator,
            damping=damping,
            max_iter=self.max_iter,
            tol=self.tol,
            preconditioner=conditioner,
        )
        return data.through(solve)


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
