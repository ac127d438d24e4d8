"""Inverse curvatures of whole models with Kronecker factors: K-FAC and EK-FAC.

Shapes: B blocks.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from math import isqrt
from typing import Any, Literal

import torch
from torch import Tensor, nn

from influence_kit.core.arguments import check_number, shown
from influence_kit.core.distributed import is_first_rank
from influence_kit.core.objects import is_one_of
from influence_kit.curvature.damping import EVIDENCE, LEARNING_RATES, MEAN, TRACE, DampingArgument
from influence_kit.curvature.evidence import evidence_damping
from influence_kit.curvature.fit_data import FitData
from influence_kit.curvature.fitted_pieces import (
    FittedPiece,
    fitted_pieces,
    form_of_block,
    is_idle,
    mean_of,
)
from influence_kit.curvature.inverse_curvature import (
    InverseCurvature,
    State,
    refuse_all_but_gradients,
)
from influence_kit.curvature.kronecker_fit import OBSERVATIONS, KroneckerFit, is_swapped
from influence_kit.curvature.kronecker_inverse import KroneckerInverse
from influence_kit.curvature.layer_forms import named
from influence_kit.curvature.misfit import misfit
from influence_kit.curvature.observations import TOTALS, Observations, curvature_factor
from influence_kit.curvature.sampled_slopes import settings_of
from influence_kit.errors import InvalidArgumentError
from influence_kit.gradients.feature_map import FeatureMap
from influence_kit.gradients.per_example import Gradients, Transform
from influence_kit.operators.damping_by_block import damping_by_block
from influence_kit.operators.partition import Partition

FisherName = Literal["fisher", "empirical_fisher"]
WithoutForm = Literal["diagonal", "leave_out", "error"]
WITHOUT = ("diagonal", "leave_out", "error")
# sampled examples whose gradients show how well the factors fit (up to twice as many), and the
# multiplications for all their inner products
MOST_SAMPLED, LEAST_SAMPLED, SAMPLED_WORK = 256, 8, 2**31


class KroneckerCurvature(InverseCurvature):
    """A Kronecker product for each layer; see ``KFACInfluenceFunction``.

    Args:
        damping: a positive number, a dict by layer, or a rule by name.
        curvature: "fisher" (at slopes sampled from the model) or "empirical_fisher" (at the labels
            of the data).
        seed: the seed of the sampled slopes.
        rtol: the largest relative error of a cheaper form of a layer's products, for layers whose
            examples have one position; it is measured, and 0 makes all products exact.
        layers_without_kronecker: how to treat parameters without a Kronecker form: "diagonal",
            "leave_out" or "error".
    """

    rules: Sequence[str] = (EVIDENCE, MEAN, TRACE, LEARNING_RATES)
    auto_rule = EVIDENCE
    # whether the eigenvalues are those of EK-FAC
    corrected: bool

    def __init__(
        self,
        damping: DampingArgument = "auto",
        curvature: FisherName = "fisher",
        seed: int = 0,
        rtol: float = 1e-5,
        layers_without_kronecker: WithoutForm = "diagonal",
    ) -> None:
        super().__init__(damping, seed)
        if not is_one_of(curvature, ("fisher", "empirical_fisher")):
            raise InvalidArgumentError(
                f'`curvature` must be "fisher" or "empirical_fisher"; got {shown(curvature)}'
            )
        if not is_one_of(layers_without_kronecker, list(WITHOUT)):
            raise InvalidArgumentError(
                '`layers_without_kronecker` must be "diagonal", "leave_out" or "error"; got '
                f"{shown(layers_without_kronecker)}"
            )
        self.curvature = curvature
        self.rtol = check_number(rtol, "rtol", least=0, below=1)
        self.layers_without_kronecker = layers_without_kronecker

    @property
    def settings(self) -> dict[str, Any]:
        return {
            **super().settings,
            "curvature": self.curvature,
            **settings_of(self.curvature),
            "layers_without_kronecker": self.layers_without_kronecker,
            # a state of an earlier version holds other numbers
            OBSERVATIONS: list(TOTALS),
        }

    def check_features(self, features: FeatureMap) -> None:
        refuse_all_but_gradients(features, type(self).__name__)

    def fit(self, data: FitData) -> State:
        fit = KroneckerFit(
            data, self.curvature, self.corrected, self.seed, self.layers_without_kronecker
        )
        state = fit()
        text = (
            f"{len(fit.left_out)} of {fit.count} parameters have no Kronecker form and are left "
            f"out, as if they were frozen: {named(fit.left_out)}"
        )
        if fit.left_out and is_first_rank() and text not in data.said:
            data.said.add(text)
            warnings.warn(text, stacklevel=2)
        return state

    # The damping.

    def traces(self, state: State, data: FitData) -> Tensor:
        partition = data.partition
        values = eigenvalues(state, partition)
        means = {block: mean_of(own) for block, own in values.items()}
        # no training example has a gradient there: the damping has no effect
        idle = {block for block in partition.blocks if block not in means}
        if data.is_of_training:
            idle |= {b for b, own in values.items() if all(is_idle(grid) for grid in own)}
        others = [mean for block, mean in means.items() if block not in idle]
        if others:
            means |= dict.fromkeys(idle, torch.stack(others).mean())
        of_blocks = torch.stack([means[block] for block in partition.blocks])
        return of_blocks * of_blocks.new_tensor(partition.sizes)

    def auto_damping(self, rule: str, state: State, data: FitData) -> Tensor:
        if rule not in (EVIDENCE, LEARNING_RATES):
            return super().auto_damping(rule, state, data)
        fitted = _fitted(state, data.partition)
        pieces = [piece for own in fitted.values() for piece in own]
        if rule == EVIDENCE:
            found = self._evidence(pieces, state, data)
        else:
            # in units of the mean loss's curvature, which are not those of these eigenvalues
            found = float(super().auto_damping(rule, state, data)[0])
            found /= curvature_factor(state[OBSERVATIONS], self.curvature != "fisher")
        every = torch.full((len(fitted),), found, dtype=torch.float64)
        left_out = misfit(
            self._sample_of(data),
            self._inverse(state, every, data, power=0.5),
            [piece.grid for piece in pieces],
            found,
        )
        return every / left_out

    def _evidence(self, pieces: list[FittedPiece], state: State, data: FitData) -> float:
        # weights of norms are about 1 and rows of tables are initialised large: a prior with mean 0
        # does not describe them
        chosen = [piece for piece in pieces if piece.is_matrix] or pieces
        return evidence_damping(
            [piece.grid for piece in chosen],
            sum(piece.squared_weights for piece in chosen),
            Observations.of(state[OBSERVATIONS], data.training_count()),
        )

    def sample_size(self, partition: Partition) -> int:
        # few examples with large gradients take as many multiplications as many with small ones
        within = isqrt(SAMPLED_WORK // sum(partition.sizes))
        return min(MOST_SAMPLED, max(LEAST_SAMPLED, within))

    def _sample_of(self, data: FitData) -> list[Gradients]:
        """Gradients of a sample of examples, at slopes sampled independently."""
        observed = data.observed(self.seed, draw=2, at_data=self.curvature != "fisher")
        return list(observed.in_chunks(data.examples.sample, sum(data.partition.sizes)))

    # The inverse.

    def inverse(self, state: State, damping: Tensor, data: FitData) -> Transform:
        return self._inverse(state, damping, data)

    def _inverse(
        self, state: State, damping: Tensor, data: FitData, power: float = 1.0
    ) -> KroneckerInverse:
        """The map that multiplies gradients by a power of the damped inverse."""
        return self.mapped(
            state, damping, data, lambda grid, value: (1 / (grid + value)).pow(power)
        )

    def mapped(
        self,
        state: State,
        damping: Tensor,
        data: FitData,
        weigh: Callable[[Tensor, float], Tensor],
    ) -> KroneckerInverse:
        """The map by a function of the eigenvalues and the block's damping."""
        fitted = _fitted(state, data.partition)
        values = damping_by_block(damping, len(fitted), positive=True).tolist()
        bases = {}
        for pieces, value in zip(fitted.values(), values, strict=True):
            for piece in pieces:
                weights = weigh(piece.grid, value)
                bases[piece.names[0]] = piece.basis(weights, data.sample, self.rtol)
        return KroneckerInverse(bases)


class KFAC(KroneckerCurvature):
    """Eigenvalues that are products of those of the factors; see ``KFACInfluenceFunction``."""

    corrected = False


class EKFAC(KroneckerCurvature):
    """Eigenvalues measured in the factors' eigenbasis; see ``EKFACInfluenceFunction``."""

    corrected = True


def eigenvalues(state: State, partition: Partition) -> dict[str, list[Tensor]]:
    """All eigenvalues of each block, diagonals included; without blocks that are left out."""
    return {
        block: [piece.grid for piece in pieces]
        for block, pieces in _fitted(state, partition).items()
        if pieces
    }


def block_forms(
    model: nn.Module, states: Mapping[int, State], partition: Partition
) -> dict[str, str]:
    """The form of the curvature of each block, at all checkpoints; empty before a fit."""
    found: dict[str, list[str]] = {}
    for _, state in sorted(states.items()):
        fitted = _fitted(state, partition)
        for block, names in partition.blocks.items():
            text = form_of_block(names, fitted[block], is_swapped(model, block))
            found.setdefault(block, []).append(text)
    return {block: " or ".join(dict.fromkeys(texts)) for block, texts in found.items()}


def _fitted(state: State, partition: Partition) -> dict[str, list[FittedPiece]]:
    """The fitted pieces by block; a block that is left out has none."""
    return fitted_pieces(state, partition.blocks)
