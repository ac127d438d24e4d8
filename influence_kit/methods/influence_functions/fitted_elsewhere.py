"""The inverse curvature of another influence function, as a preconditioner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from influence_kit.curvature.fit_data import FitData
from influence_kit.curvature.inverse_curvature import InverseCurvature, State
from influence_kit.curvature.preconditioners import PreconditionerArgument
from influence_kit.errors import InvalidArgumentError
from influence_kit.gradients.feature_map import FeatureMap
from influence_kit.gradients.per_example import Transform
from influence_kit.methods.influence_functions.influence_function import InfluenceFunction


def as_preconditioner(
    given: PreconditionerArgument | InfluenceFunction,
) -> PreconditionerArgument:
    """The argument of a class; of another method, its inverse curvature."""
    return FittedElsewhere(given) if isinstance(given, InfluenceFunction) else given


class FittedElsewhere(InverseCurvature):
    """The inverse curvature of another method, whose fit is used where there is one.

    Args:
        method: an influence function of the same parameters and checkpoints.
    """

    def __init__(self, method: InfluenceFunction) -> None:
        super().__init__(method.damping, method.inverse.seed)
        self._method, self._inverse = method, method.inverse

    def __repr__(self) -> str:
        return type(self._method).__name__

    @property
    def settings(self) -> dict[str, Any]:
        return {"class": type(self._inverse).__name__, **self._inverse.settings}

    def blocks_of(self, model: nn.Module, names: Sequence[str]) -> Mapping[str, list[str]]:
        return self._inverse.blocks_of(model, names)

    def check_features(self, features: FeatureMap) -> None:
        self._inverse.check_features(features)

    def fit(self, data: FitData) -> State:
        there, here = (
            f"{count} checkpoints with the blocks {', '.join(blocks)}"
            for count, blocks in (
                (len(self._method.checkpoints), self._method.block_names),
                (len(data.checkpoints), data.partition.blocks),
            )
        )
        if there != here:
            raise InvalidArgumentError(
                f"`preconditioner` belongs to {there}; here are {here}: pass a method of the same "
                'model, `layers` and checkpoints, or a name ("ekfac")'
            )
        known = self._method.fit_state.get(data.checkpoint)
        return self._inverse.fit(data) if known is None else dict(known)

    def traces(self, state: State, data: FitData) -> Tensor:
        return self._inverse.traces(state, data)

    def inverse(self, state: State, damping: Tensor, data: FitData) -> Transform:
        return self._inverse.inverse(state, damping, data)
