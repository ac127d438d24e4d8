"""Feature maps: what the examples of a batch are turned into, at a checkpoint.

Shapes: n examples of a batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from influence_kit.core.dtypes import real_shape
from influence_kit.core.summary import summary
from influence_kit.data.batches import Batch
from influence_kit.gradients.gradient_source import GradientSource
from influence_kit.gradients.per_example import Gradients
from influence_kit.losses.loss import Loss


class FeatureMap:
    """The gradients of the chosen parameters; subclasses make other features of them.

    A map holds settings. A method binds a copy of it to the parameters of its model (``bound_to``),
    so that one map serves any number of methods.
    """

    # ``repr`` is to be shown where a method shows its arguments
    shows_settings = True
    # short enough for those of a training set to be cached in memory
    is_short = False
    # whether they are a linear map of the gradients of the loss
    is_linear = True
    # whether a gradient is written out to be turned into features
    writes_out = False
    _source: GradientSource | None = None

    def __repr__(self) -> str:
        return summary(self)

    @property
    def settings(self) -> dict[str, Any]:
        """What the features depend on beside model, data and loss."""
        return {"features": "gradients"}

    def bound_to(self, source: GradientSource) -> FeatureMap:
        """A copy for the parameters of a model."""
        bound = copy.copy(self)
        bound._source = source
        bound.bind()
        return bound

    def bind(self) -> None:
        """Make what depends on the parameters, which ``source`` has now."""

    @property
    def source(self) -> GradientSource:
        """The gradients of the model's chosen parameters."""
        assert self._source is not None, "a feature map is bound to a model by the method"
        return self._source

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        """The shapes of an example's features, by name."""
        return self.gradient_shapes

    @property
    def gradient_shapes(self) -> Mapping[str, torch.Size]:
        """The shapes of an example's gradients, by parameter."""
        parameters = self.source.capture.parameters
        return {name: real_shape(parameter) for name, parameter in parameters.items()}

    def features(self, checkpoint: int, batch: Batch, loss: Loss) -> Gradients:
        """The features of each example, at the checkpoint that is in the model."""
        return self.source(batch, loss)

    def train_features(self, checkpoint: int, batch: Batch, loss: Loss) -> Gradients:
        """The features of training examples, for terms."""
        return self.of_cached(self.cached(checkpoint, batch, loss))

    def with_source(self, source: GradientSource) -> FeatureMap:
        """The bound map, of gradients from another source (of tokens, each like an example)."""
        other = copy.copy(self)
        other._source = source
        return other

    def transpose(self, features: Gradients) -> Gradients:
        """The transposed map: gradients whose products with gradients are those of the features."""
        return features

    # What is cached of training examples, where that is more than their features.

    @property
    def cached_settings(self) -> dict[str, Any]:
        """What cached features depend on beside model, data and loss."""
        return self.settings

    @property
    def cached_shapes(self) -> Mapping[str, torch.Size]:
        """The shapes of what is cached of a training example."""
        return self.shapes

    def cached(self, checkpoint: int, batch: Batch, loss: Loss) -> Gradients:
        """What is cached of training examples."""
        return self.features(checkpoint, batch, loss)

    def of_cached(self, cached: Gradients) -> Gradients:
        """The features in what is cached."""
        return cached

    def identifying_losses(self, loss: Loss) -> list[Loss]:
        """What training features depend on: ``loss``, the training loss, or other functions."""
        return [loss]

    @property
    def identifying(self) -> FeatureMap:
        """The map whose features of some examples identify a fit: one that need not be learnt."""
        return self

    # The parts of layers, where features have other names than parameters.

    @property
    def has_parts(self) -> bool:
        """Whether ``by_parameter`` and ``repeated`` split the features by parameter."""
        return False

    def by_parameter(self, checkpoint: int, batch: Batch, loss: Loss) -> Gradients:
        """What each parameter adds to training features, under its name."""
        raise NotImplementedError

    def repeated(self, features: Gradients, names: Sequence[str]) -> Gradients:
        """The same features under each of the names, to meet what is split by parameter."""
        raise NotImplementedError

    # What is learnt from training examples before there are features.

    @property
    def is_learnt(self) -> bool:
        """Whether there is nothing to learn, or it has been learnt."""
        return True

    def learn(self, examples: Callable[[Tensor], Iterable[Batch]], n: int, loss: Loss) -> None:
        """Learn from training examples, with the first checkpoint in the model.

        Args:
            examples: gives those at some indices, in batches.
            n: how many there are.
            loss: the training loss.
        """

    @property
    def state(self) -> dict[str, Tensor]:
        """What has been learnt, by name; saved with a fit."""
        return {}

    def take_state(self, state: Mapping[str, Tensor]) -> None:
        """Take what ``state`` gave when it was saved."""

    def forget(self) -> None:
        """Drop what has been learnt."""
