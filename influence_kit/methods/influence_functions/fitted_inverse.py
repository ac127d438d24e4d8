"""An inverse curvature at the checkpoints of a method: its states, its damping, its inverses.

Shapes: B blocks of the curvature.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from influence_kit.core.arguments import shown
from influence_kit.curvature.damping import AUTO, DampingArgument, as_text, check_damping
from influence_kit.curvature.fit_data import FitData
from influence_kit.curvature.inverse_curvature import InverseCurvature
from influence_kit.errors import InvalidArgumentError
from influence_kit.gradients.feature_map import FeatureMap
from influence_kit.gradients.per_example import Gradients, Transform
from influence_kit.methods.fit_cache import FitCache
from influence_kit.operators.partition import Partition


class FittedInverse:
    """The inverse curvature of a method with its fitted states.

    Args:
        inverse: the inverse curvature.
        cache: the states of its fits.
    """

    def __init__(self, inverse: InverseCurvature, cache: FitCache) -> None:
        self.inverse, self.cache = inverse, cache
        self._damping: DampingArgument = inverse.damping

    def bind(self, model: nn.Module, shapes: Mapping[str, torch.Size]) -> None:
        """Divide features of these shapes into blocks, by which a damping can be given."""
        self.partition = Partition(self.inverse.blocks_of(model, list(shapes)), shapes)
        self.damping = self._damping

    @property
    def blocks(self) -> list[str]:
        """The names of the blocks."""
        return list(self.partition.blocks)

    # The damping.

    @property
    def damping(self) -> DampingArgument:
        """The damping as given; setting it does not fit again."""
        return self._damping

    @damping.setter
    def damping(self, damping: DampingArgument) -> None:
        name, rules = self.inverse.wording.damping, self.inverse.rules
        self._damping = check_damping(damping, self.blocks, name, rules)
        self.cache.drop_inverses()

    @property
    def is_auto(self) -> bool:
        """Whether the damping is the rule of the class."""
        return self._damping == AUTO

    @property
    def rule(self) -> str | None:
        """The rule of the damping; None if it is given as numbers."""
        if not isinstance(self._damping, str):
            return None
        return self.inverse.auto_rule if self.is_auto else self._damping

    def damping_at(self, index: int) -> list[float]:
        """The damping of each block at a checkpoint that is fitted."""
        if self.rule is not None:
            found: list[float] = self.cache.states[index][self._key].tolist()
            return found
        if isinstance(self._damping, Mapping):
            return [self._damping[name] for name in self.blocks]
        return [float(self._damping)] * len(self.blocks)

    @property
    def damping_used(self) -> list[dict[str, float]]:
        """The damping by block, at each checkpoint that has one."""
        states = self.cache.states
        known = [
            index for index in sorted(states) if self.rule is None or self._key in states[index]
        ]
        return [dict(zip(self.blocks, self.damping_at(index), strict=True)) for index in known]

    @property
    def damping_text(self) -> str:
        """The damping as given, and the values used."""
        used = [value for own in self.damping_used for value in own.values()]
        return as_text(self.inverse.wording.damping, self._damping, self.rule, used)

    @property
    def _key(self) -> str:
        return f"{self.rule}_damping"

    # The inverse.

    def fit(self, data: FitData) -> None:
        """Compute the inverse at the checkpoint in the model; fits if there is no state yet."""
        index, states = data.checkpoint, self.cache.states
        if index not in states:
            states[index] = {**self.inverse.fit(data), **data.map.state}
        if index not in self.cache.inverses:
            if self.rule is not None and self._key not in states[index]:
                states[index][self._key] = self.inverse.auto_damping(self.rule, states[index], data)
            damping = torch.tensor(self.damping_at(index), dtype=torch.float64, device=data.device)
            self.cache.inverses[index] = self.inverse.inverse(states[index], damping, data)

    def at(self, index: int) -> Transform:
        """The map to preconditioned gradients at a checkpoint, which may be fitted later."""

        def apply(gradients: Gradients) -> Gradients:
            return self.cache.inverses[index](gradients)

        return apply

    @property
    def size(self) -> int:
        """The number of entries of all blocks."""
        return sum(self.partition.sizes)

    def description(self) -> dict[str, object]:
        """The settings of the inverse that a saved fit depends on."""
        # a list: the order counts
        blocks = [list(block) for block in self.partition.blocks.items()]
        return {**self.inverse.settings, "blocks": blocks}


def check_inverse(inverse: Any, features: FeatureMap) -> InverseCurvature:
    """The argument ``inverse``, checked to be an inverse curvature that supports the features."""
    if not isinstance(inverse, InverseCurvature):
        raise InvalidArgumentError(
            "`inverse` must be an InverseCurvature, such as `influence_kit.curvature.EKFAC()`; got "
            f"{shown(inverse)}"
        )
    inverse.check_features(features)
    return inverse
