"""Feature maps: what the examples of a batch are turned into, at a checkpoint.

Shapes: n examples of a batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from influence_kit.core.arguments import shown
from influence_kit.core.dtypes import real_shape
from influence_kit.core.memory import rows_within, workspace_bytes
from influence_kit.core.summary import summary
from influence_kit.data.batches import Batch
from influence_kit.errors import InvalidArgumentError
from influence_kit.gradients.gradient_source import GradientSource
from influence_kit.gradients.per_example import Gradients, Transform, join_examples
from influence_kit.losses.loss import Loss

# a transform for each checkpoint, given by its index
AtCheckpoint = Callable[[int], Transform]
DIRECTION = "direction of "


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
    _direction: AtCheckpoint | None = None

    def __repr__(self) -> str:
        return summary(self)

    @property
    def settings(self) -> dict[str, Any]:
        """What the features depend on beside model, data and loss."""
        return {"features": "gradients"}

    def bound_to(self, source: GradientSource, direction: AtCheckpoint | None = None) -> FeatureMap:
        """A copy for the parameters of a model.

        Args:
            source: the gradients of these parameters.
            direction: turns gradients into the directions of an optimizer's step, whose features
                training examples have; see ``directed``.
        """
        bound = copy.copy(self)
        bound._source, bound._direction = source, direction
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
        return self.of_gradients(checkpoint, self.source(batch, loss))

    def of_gradients(self, checkpoint: int, gradients: Gradients) -> Gradients:
        """The features, given the gradients of the examples."""
        return gradients

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

    # What is cached of training examples, if that is more than their features.

    @property
    def cached_settings(self) -> dict[str, Any]:
        """What cached features depend on beside model, data and loss."""
        return {**self.settings, "optimizer": "adam"} if self._has_both else self.settings

    @property
    def cached_shapes(self) -> Mapping[str, torch.Size]:
        """The shapes of what is cached of a training example."""
        both = {f"{DIRECTION}{name}": shape for name, shape in self.shapes.items()}
        return {**self.shapes, **both} if self._has_both else self.shapes

    def cached(self, checkpoint: int, batch: Batch, loss: Loss) -> Gradients:
        """What is cached of training examples."""
        if not self._has_both:
            return self.features(checkpoint, batch, loss)
        gradients = self.source(batch, loss)
        own = self.of_gradients(checkpoint, gradients)
        moved = self._of_directions(checkpoint, gradients)
        forms = {**own.forms, **{f"{DIRECTION}{name}": f for name, f in moved.forms.items()}}
        return Gradients(own.n, forms, self.cached_shapes, own.sample)

    def of_cached(self, cached: Gradients) -> Gradients:
        """The features in what is cached; features themselves stay as they are."""
        return self._named(cached, "") if self._has_both else cached

    # The directions of an optimizer, for training examples.

    def directed(self, checkpoint: int) -> Transform:
        """The transform of what is cached to the features of directions."""
        assert self._direction is not None
        if self._has_both:
            return lambda cached: self._named(cached, DIRECTION)
        return self._direction(checkpoint)

    @property
    def _has_both(self) -> bool:
        """Whether features of gradients and of directions are cached: neither gives the other."""
        is_plain = type(self).of_gradients is FeatureMap.of_gradients
        return self._direction is not None and not is_plain

    def _of_directions(self, checkpoint: int, gradients: Gradients) -> Gradients:
        """The features of directions, which have no zeros where gradients have."""
        assert self._direction is not None
        direction, sample = self._direction(checkpoint), gradients.sample
        p = sum(shape.numel() for shape in gradients.parameters.values())
        step = rows_within(workspace_bytes(sample.device), 2 * p * sample.element_size())
        slices = (slice(start, start + step) for start in range(0, gradients.n, step))
        return join_examples(
            [self.of_gradients(checkpoint, direction(gradients.rows(rows))) for rows in slices]
        )

    def _named(self, cached: Gradients, prefix: str) -> Gradients:
        """The features whose names in what is cached begin with this, under their own names."""
        forms = {
            name: cached.forms[prefix + name]
            for name in self.shapes
            if prefix + name in cached.forms
        }
        return Gradients(cached.n, forms, self.shapes, cached.sample)

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


def check_feature_map(features: Any, optimizer: str | None = None) -> FeatureMap:
    """The argument ``features``, checked; None stands for the gradients themselves.

    Args:
        features: the argument.
        optimizer: the optimizer whose directions take the place of gradients; None for none.

    Raises:
        InvalidArgumentError: if it is not a feature map, or maps no gradients that are given.
    """
    if features is None:
        return FeatureMap()
    if not isinstance(features, FeatureMap):
        raise InvalidArgumentError(
            "`features` must be a FeatureMap, such as `influence_kit.projections.Projected(256)`; "
            f"got {shown(features)}"
        )
    if optimizer is not None and type(features).features is not FeatureMap.features:
        raise InvalidArgumentError(
            f'optimizer="{optimizer}" changes gradients before `features` maps them, and '
            f"{type(features).__name__} computes features from batches: let it override "
            "`of_gradients` in place of `features`"
        )
    return features
