"""TRAK's features: projected gradients of an output function, and how much an example has to say.

Letters: n examples, k entries of their features.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor

from influence_kit.core.arguments import check_count
from influence_kit.core.dtypes import exact_dtype
from influence_kit.data.batches import Batch, call_model, example_count, targets_of
from influence_kit.errors import InvalidArgumentError
from influence_kit.gradients.forms import Dense
from influence_kit.gradients.gradient_source import GradientSource
from influence_kit.gradients.per_example import Gradients
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


def check_features(projection: object, projection_dim: object, shift: object) -> None:
    """Refuse arguments of ``TRAK`` that make no features."""
    if projection not in KINDS:
        raise InvalidArgumentError(
            f"`projection` must be one of {', '.join(KINDS)}; got {projection!r}"
        )
    check_count(projection_dim, "projection_dim")
    if shift is not None and (isinstance(shift, bool) or shift not in (0, 1)):
        raise InvalidArgumentError(f"`shift` must be None, 0 or 1; got {shift!r}")


@dataclass
class OutputFeatures:
    """phi = P^T grad f, with one projection P of all parameters for each checkpoint.

    Args:
        source: of the model's gradients.
        output_fn: the function f; None for the margin of a classifier.
        loss: whose slope along f is asked for, where f is not the margin.
        kind: of the projection.
        dim: the letter k; all parameters' entries where nothing is projected.
        seed: of the projections.
        shift: by how many positions labels are behind logits, for the margin.
        test_output: what is differentiated of test examples; None for f.
    """

    source: GradientSource
    output_fn: OutputFunction | None
    loss: Loss
    kind: str
    dim: int
    seed: int
    shift: int | None = None
    test_output: Loss | None = None
    _projections: dict[int, JointProjection] = field(default_factory=dict)

    @cached_property
    def output(self) -> Loss:
        """The output function, as what is differentiated."""
        margin = partial(classification_margin, shift=self.shift)
        return Loss(self.output_fn or margin, "none", "output_fn")

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        """Of the features, by name."""
        return {FEATURES: torch.Size([self._at(0).k])}

    @property
    def all_shapes(self) -> Mapping[str, torch.Size]:
        """Of the features with their slopes."""
        return {**self.shapes, SLOPE: torch.Size([1])}

    def _at(self, checkpoint: int) -> JointProjection:
        if checkpoint not in self._projections:
            parameters = self.source.capture.parameters
            key = (self.seed, checkpoint)
            made = joint_projection(parameters, self.kind, self.dim, FEATURES, *key)
            self._projections[checkpoint] = made
        return self._projections[checkpoint]

    def __call__(self, checkpoint: int, batch: Batch) -> Gradients:
        """The features of a batch, at the checkpoint that is in the model."""
        return self._at(checkpoint)(self.source(batch, self.output))

    def of_tests(self, checkpoint: int, batch: Batch) -> Gradients:
        """The same of test examples."""
        return self._at(checkpoint)(self.source(batch, self.test_output or self.output))

    def by_parameter(self, checkpoint: int, batch: Batch) -> Gradients:
        """What each parameter adds to them, under its name."""
        return self._at(checkpoint).of_parameters(self.source(batch, self.output))

    def with_slopes(self, checkpoint: int, batch: Batch) -> Gradients:
        """The features, and beside them the slopes."""
        features, slopes = self(checkpoint, batch), self.slopes_alone(batch)
        forms = {**features.forms, **slopes.forms}
        return Gradients(features.n, forms, self.all_shapes, features.sample)

    def slopes_alone(self, batch: Batch) -> Gradients:
        """The slopes of a batch, at the checkpoint that is in the model."""
        first = next(iter(self.source.capture.parameters.values())).detach()
        sample = first.new_empty(0, dtype=exact_dtype(first.dtype))
        slopes, one = self._slopes(batch).to(sample), torch.Size([1])
        return Gradients(len(slopes), {SLOPE: Dense(slopes[:, None], one)}, {SLOPE: one}, sample)

    def _slopes(self, batch: Batch) -> Tensor:
        """1 - p of each example, or the slope -dL/df of the loss that stands for it, ``[n]``."""
        with torch.no_grad():
            outputs = call_model(self.source.capture.model, batch)
            if self.output_fn is None:
                return one_minus_probability(outputs, targets_of(batch), self.shift)
        # a loss that does not say what it reduces over is asked
        self.source.prepare(batch, self.loss)
        return slope_along(self.loss, self.output_fn, outputs, batch, example_count(batch))


def alone(gradients: Gradients) -> Gradients:
    """The features without the slopes."""
    form = gradients.forms[FEATURES]
    return Gradients(gradients.n, {FEATURES: form}, {FEATURES: form.shape}, gradients.sample)


def repeated(features: Gradients, names: list[str]) -> Gradients:
    """The same features under each of the names: to meet what is split by parameter."""
    form = features.forms[FEATURES]
    shapes = dict.fromkeys(names, form.shape)
    return Gradients(features.n, dict.fromkeys(names, form), shapes, features.sample)
