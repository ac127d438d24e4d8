"""TRAK's features: projected gradients of an output function, and the slopes of the loss.

Shapes: n examples, k entries of their features.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from influence_kit.core.arguments import check_count, shown
from influence_kit.core.draws import check_seed
from influence_kit.core.dtypes import exact_dtype
from influence_kit.core.objects import check_functions, is_one_of
from influence_kit.data.batches import Batch, call_model, example_count, targets_of
from influence_kit.errors import InvalidArgumentError
from influence_kit.gradients.feature_map import FeatureMap
from influence_kit.gradients.forms import Dense
from influence_kit.gradients.per_example import Gradients
from influence_kit.losses.declared_reduction import declared_reduction
from influence_kit.losses.loss import Loss
from influence_kit.losses.margins import (
    OutputFunction,
    classification_margin,
    one_minus_probability,
    slope_along,
)
from influence_kit.projections.joint_projection import JointProjection, joint_projection

FEATURES, SLOPE = "features", "1 - p"
KINDS = ("sjlt", "rademacher", "gaussian", "identity")


class OutputFeatures(FeatureMap):
    """phi = P^T grad f, with one projection P of all parameters for each checkpoint.

    The slope of a training example, 1 - p, is cached with its features.

    Args:
        projection: the kind of the projection: "sjlt", "rademacher", "gaussian" or "identity".
        projection_dim: entries of the features; the number of parameters with "identity".
        seed: the seed of the projections.
        shift: the number of positions by which labels lag behind logits, for the margin.
        output_fn: the function f; None for the margin of a classifier.
        test_output_fn: the function of test examples; None for f.
    """

    is_short = True
    is_linear = False
    writes_out = True

    def __init__(
        self,
        projection: str = "sjlt",
        projection_dim: int = 512,
        seed: int = 0,
        shift: int | None = None,
        output_fn: OutputFunction | None = None,
        test_output_fn: OutputFunction | None = None,
    ) -> None:
        if not is_one_of(projection, list(KINDS)):
            raise InvalidArgumentError(
                f"`projection` must be one of {', '.join(KINDS)}; got {shown(projection)}"
            )
        if shift is not None and (type(shift) is not int or shift not in (0, 1)):
            raise InvalidArgumentError(f"`shift` must be None, 0 or 1; got {shown(shift)}")
        self.projection, self.shift = projection, shift
        self.projection_dim = check_count(projection_dim, "projection_dim")
        self.seed = check_seed(seed)
        check_functions({"output_fn": output_fn}, "output_fn(outputs, targets)")
        self.output_fn = output_fn
        margin = partial(classification_margin, shift=shift)
        self._output = Loss(output_fn or margin, "none", "output_fn")
        self._test_output = self._output
        if test_output_fn is not None:  # not negated: for features, higher is better
            reduction = declared_reduction(test_output_fn, None, "test_output_fn")
            self._test_output = Loss(test_output_fn, reduction, "test_output_fn")

    def bind(self) -> None:
        self._projections: dict[int, JointProjection] = {}

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "features": "projected gradients of the output function",
            "projection": self.projection,
            "projection_dim": self._at(0).k,
            "seed": self.seed,
        }

    def identifying_losses(self, loss: Loss) -> list[Loss]:
        # the slopes depend on another function
        return [self._output] if self.output_fn is None else [self._output, loss]

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        """The shape of the features, by name."""
        return {FEATURES: torch.Size([self._at(0).k])}

    @property
    def cached_shapes(self) -> Mapping[str, torch.Size]:
        return {**self.shapes, SLOPE: torch.Size([1])}

    def _at(self, checkpoint: int) -> JointProjection:
        if checkpoint not in self._projections:
            parameters = self.source.capture.parameters
            key = (self.seed, checkpoint)
            made = joint_projection(
                parameters, self.projection, self.projection_dim, FEATURES, *key
            )
            self._projections[checkpoint] = made
        return self._projections[checkpoint]

    def features(self, checkpoint: int, batch: Batch, loss: Loss) -> Gradients:
        """The features of test examples; ``loss`` is not used."""
        return self._at(checkpoint)(self.source(batch, self._test_output))

    def train_features(self, checkpoint: int, batch: Batch, loss: Loss) -> Gradients:
        return self._at(checkpoint)(self.source(batch, self._output))

    def cached(self, checkpoint: int, batch: Batch, loss: Loss) -> Gradients:
        features = self._at(checkpoint)(self.source(batch, self._output))
        slopes = self.slopes_alone(batch, loss)
        forms = {**features.forms, **slopes.forms}
        return Gradients(features.n, forms, self.cached_shapes, features.sample)

    def of_cached(self, cached: Gradients) -> Gradients:
        return _alone(cached)

    has_parts = True

    def by_parameter(self, checkpoint: int, batch: Batch, loss: Loss) -> Gradients:
        return self._at(checkpoint).of_parameters(self.source(batch, self._output))

    def repeated(self, features: Gradients, names: Sequence[str]) -> Gradients:
        form = features.forms[FEATURES]
        shapes = dict.fromkeys(names, form.shape)
        return Gradients(features.n, dict.fromkeys(names, form), shapes, features.sample)

    def slopes_alone(self, batch: Batch, loss: Loss) -> Gradients:
        """The slopes of a batch, at the checkpoint that is in the model."""
        first = next(iter(self.source.capture.parameters.values())).detach()
        sample = first.new_empty(0, dtype=exact_dtype(first.dtype))
        slopes, one = self._slopes(batch, loss).to(sample), torch.Size([1])
        return Gradients(len(slopes), {SLOPE: Dense(slopes[:, None], one)}, {SLOPE: one}, sample)

    def _slopes(self, batch: Batch, loss: Loss) -> Tensor:
        """1 - p of each example, or the slope -dL/df of the loss that replaces it, ``[n]``."""
        with torch.no_grad():
            outputs = call_model(self.source.capture.model, batch)
            if self.output_fn is None:
                return one_minus_probability(outputs, targets_of(batch), self.shift)
        # detect the reduction of a loss that does not declare it
        self.source.prepare(batch, loss)
        return slope_along(loss, self.output_fn, outputs, batch, example_count(batch))


def _alone(gradients: Gradients) -> Gradients:
    """The features without the slopes."""
    form = gradients.forms[FEATURES]
    return Gradients(gradients.n, {FEATURES: form}, {FEATURES: form.shape}, gradients.sample)
