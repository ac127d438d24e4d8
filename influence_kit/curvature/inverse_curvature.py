"""The part of an influence function that inverts the curvature.

Shapes: B blocks of the curvature.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from influence_kit.core.draws import check_seed
from influence_kit.core.summary import summary
from influence_kit.curvature.damping import (
    LEARNING_RATES,
    MEAN,
    SHARE,
    TRACE,
    DampingArgument,
    early_stopping,
    share_of,
)
from influence_kit.curvature.fit_data import FitData
from influence_kit.curvature.wording import OF_CURVATURE, Wording
from influence_kit.errors import InvalidArgumentError
from influence_kit.gradients.feature_map import FeatureMap
from influence_kit.gradients.parameter_selection import group_by_layer
from influence_kit.gradients.per_example import Transform
from influence_kit.operators.partition import Partition

# the tensors that are fitted at a checkpoint, by name
State = dict[str, Tensor]
TRACES = "traces"


class InverseCurvature(ABC):
    """Fits a curvature C at a checkpoint, and applies (C + damping I)^-1 to gradients.

    An inverse curvature holds settings; the result of a fit at a checkpoint is its state, tensors
    by name, which a method caches and saves. So one object serves any number of methods.

    Args:
        damping: a number, one for each block (a dict), or a rule by name; see
            ``InfluenceFunction``.
        seed: the seed of all random numbers.
    """

    # the ``repr`` of a method shows the settings of this object
    shows_settings = True
    # rules that ``damping`` may name, the one that "auto" stands for, and the share of trace rules
    rules: Sequence[str] = (MEAN, TRACE)
    auto_rule = MEAN
    auto_share = SHARE
    # what errors call the curvature and the damping
    wording: Wording = OF_CURVATURE
    # whether ``inverse`` is a symmetric linear map (to the tolerance of a solver)
    is_symmetric = True

    def __init__(self, damping: DampingArgument = "auto", seed: int = 0) -> None:
        self.damping = damping
        self.seed = check_seed(seed)

    def __repr__(self) -> str:
        return summary(self)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that the state depends on, beside model, data and loss."""
        return {"seed": self.seed}

    @property
    def takes_own_labels(self) -> bool:
        """Whether it is fitted to features at the labels of the data, which may be cached."""
        return False

    @property
    def couples_layers(self) -> bool:
        """Whether one block holds the parameters of several layers."""
        return False

    def blocks_of(self, model: nn.Module, names: Sequence[str]) -> Mapping[str, list[str]]:
        """The names of parameters by block of the curvature: by layer, unless overridden."""
        return group_by_layer(model, names, None)

    def check_features(self, features: FeatureMap) -> None:
        """Refuse features whose curvature it cannot fit; it takes all, unless overridden."""
        return

    def sample_size(self, partition: Partition) -> int:
        """The number of examples in ``FitData.examples.sample``, up to twice as many."""
        return 1

    def fit(self, data: FitData) -> State:
        """The state at the checkpoint that is in the model; empty, unless overridden."""
        return {}

    @abstractmethod
    def traces(self, state: State, data: FitData) -> Tensor:
        """The trace of each block of the curvature ``[B]``, float64."""

    @abstractmethod
    def inverse(self, state: State, damping: Tensor, data: FitData) -> Transform:
        """The map of gradients by (C + damping I)^-1, given the damping of each block ``[B]``."""

    def auto_damping(self, rule: str, state: State, data: FitData) -> Tensor:
        """The damping of each block ``[B]``, float64, by one of ``rules``.

        The state holds the traces of which the rules "mean" and "trace" are shares.
        """
        blocks = dict(zip(data.partition.blocks, data.partition.sizes, strict=True))
        if rule == LEARNING_RATES:
            found = early_stopping(data.checkpoints, data.checkpoint, self.rules)
            return torch.full((len(blocks),), found, dtype=torch.float64)
        if TRACES not in state:
            state[TRACES] = self.traces(state, data)
        share = self.share(data)
        return share_of(state[TRACES], blocks, data.count, rule, share, data.argument)

    def share(self, data: FitData) -> float:
        """The share of the rules "mean" and "trace"."""
        return self.auto_share


def refuse_all_but_gradients(features: FeatureMap, name: str) -> None:
    """Refuse features that are not the gradients of parameters.

    Raises:
        InvalidArgumentError: for projected gradients, for example.
    """
    own, plain = type(features), FeatureMap
    if (own.features, own.of_gradients) != (plain.features, plain.of_gradients):
        raise InvalidArgumentError(
            f"{name} is a curvature of the model's parameters, and `features` is "
            f"{type(features).__name__}, which has none: leave `features` out, or use "
            'Explicit(curvature="empirical_fisher"), whose curvature is made of the features'
        )
