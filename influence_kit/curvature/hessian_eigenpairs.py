"""The inverse of the largest eigenpairs of the summed Hessian, as in Captum."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from influence_kit.core.arguments import check_count, check_number
from influence_kit.core.objects import check_flags
from influence_kit.curvature.curvature import HessianOfLoss
from influence_kit.curvature.fit_data import FitData
from influence_kit.curvature.inverse_curvature import (
    InverseCurvature,
    State,
    refuse_all_but_gradients,
)
from influence_kit.errors import CurvatureError
from influence_kit.gradients.feature_map import FeatureMap
from influence_kit.gradients.per_example import Transform
from influence_kit.operators.low_rank import EigenPairs, LowRank, arnoldi, as_tensors, from_tensors
from influence_kit.operators.operator import Operator, Scaled


class HessianEigenpairs(InverseCurvature):
    """V D^-1 V^T of the Hessian of the loss, *summed* over the data; small eigenvalues are dropped.

    Args:
        hessian_reg: added to the eigenvalues.
        projection_dim: how many of the largest eigenvalues count; None for all.
        hessian_inverse_tol: eigenvalues must be above it to count.
        projection_on_cpu: keep the eigenvectors on the CPU.
        seed: the seed of random numbers.
    """

    couples_layers = True

    def __init__(
        self,
        hessian_reg: float,
        projection_dim: int | None,
        hessian_inverse_tol: float,
        projection_on_cpu: bool,
        seed: int,
    ) -> None:
        super().__init__(check_number(hessian_reg, "hessian_reg", least=0), seed)
        if projection_dim is not None:
            projection_dim = check_count(projection_dim, "projection_dim", instead="None")
        self.projection_dim = projection_dim
        self.hessian_inverse_tol = check_number(hessian_inverse_tol, "hessian_inverse_tol", least=0)
        check_flags({"projection_on_cpu": projection_on_cpu})
        self.projection_on_cpu = projection_on_cpu

    @abstractmethod
    def pairs(self, hessian: Operator) -> EigenPairs:
        """Eigenpairs of the summed Hessian."""

    def blocks_of(self, model: nn.Module, names: Sequence[str]) -> Mapping[str, list[str]]:
        return {"full": list(names)}

    def check_features(self, features: FeatureMap) -> None:
        refuse_all_but_gradients(features, "the Hessian")

    def fit(self, data: FitData) -> State:
        mean = HessianOfLoss(data.source, data.loss, data.examples, data.partition, data.sample)
        state = as_tensors([self.pairs(Scaled(mean, data.count))])
        on_cpu = self.projection_on_cpu
        return {name: value.cpu() if on_cpu else value for name, value in state.items()}

    def traces(self, state: State, data: FitData) -> Tensor:
        return state["values.0"].sum()[None]

    def inverse(self, state: State, damping: Tensor, data: FitData) -> Transform:
        chosen = self.chosen(state, float(damping[0]))
        return data.through(LowRank([chosen], 0.0, complement=False))

    def chosen(self, state: State, hessian_reg: float) -> EigenPairs:
        """The eigenpairs that count, with ``hessian_reg`` added, the largest first."""
        (pair,) = from_tensors(state, 1)
        values = pair.values + hessian_reg
        order = torch.argsort(values, descending=True)[: self.projection_dim]
        order = order[values[order] > self.hessian_inverse_tol]
        if not len(order):
            raise CurvatureError(
                "Hessian has no positive eigenvalues: with `hessian_reg` added the largest is "
                f"{float(values.max()):.4g}, which is not above `hessian_inverse_tol` "
                f"({self.hessian_inverse_tol}); train the model to a minimum, raise `hessian_reg`, "
                "or use `ExplicitInfluenceFunction`, whose default curvature is never negative"
            )
        return EigenPairs(values[order], pair.vectors[:, order])

    def projection(self, state: State, hessian_reg: float, sample: Tensor) -> Tensor:
        """The matrix R ``[P, d]``; R R^T is the inverse."""
        pair = self.chosen(state, hessian_reg)
        return (pair.vectors / pair.values.sqrt()).to(sample)


class ExactEigenpairs(HessianEigenpairs):
    """The eigenpairs of the whole Hessian; see ``NaiveInfluenceFunction``."""

    def pairs(self, hessian: Operator) -> EigenPairs:
        (block,) = hessian.dense()
        return EigenPairs(*torch.linalg.eigh(block))


class ArnoldiEigenpairs(HessianEigenpairs):
    """The eigenpairs of the Hessian in a Krylov subspace; see ``ArnoldiInfluenceFunction``.

    Args:
        arnoldi_dim: the largest dimension of the subspace.
        arnoldi_tol: stop if the next direction is shorter than this.
        hessian_reg, projection_dim, hessian_inverse_tol, projection_on_cpu, seed: as in
            ``HessianEigenpairs``.
    """

    def __init__(
        self,
        arnoldi_dim: int,
        arnoldi_tol: float,
        hessian_reg: float,
        projection_dim: int | None,
        hessian_inverse_tol: float,
        projection_on_cpu: bool,
        seed: int,
    ) -> None:
        self.arnoldi_dim = check_count(arnoldi_dim, "arnoldi_dim")
        self.arnoldi_tol = check_number(arnoldi_tol, "arnoldi_tol", least=0)
        super().__init__(hessian_reg, projection_dim, hessian_inverse_tol, projection_on_cpu, seed)

    @property
    def settings(self) -> dict[str, Any]:
        own = {"arnoldi_dim": self.arnoldi_dim, "arnoldi_tol": self.arnoldi_tol}
        return {**super().settings, **own}

    def pairs(self, hessian: Operator) -> EigenPairs:
        (pair,) = arnoldi(hessian, self.arnoldi_dim, self.arnoldi_tol, self.seed)
        return pair
