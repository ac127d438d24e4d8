"""The features and labels of examples for a nearest-neighbour model, read by all ranks together.

Shapes: n examples, d features of an example.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from influence_kit.core.distributed import gather_columns, is_mine
from influence_kit.core.scaling import unit_rows
from influence_kit.data.batches import Batch, example_count, to_device
from influence_kit.data.class_labels import labels_of
from influence_kit.errors import InvalidArgumentError, NonFiniteError
from influence_kit.methods.activations import Features


@dataclass(frozen=True)
class Points:
    """Features ``[n, d]`` and labels ``[n]``."""

    features: Tensor
    labels: Tensor

    @property
    def n(self) -> int:
        """The number of examples."""
        return len(self.labels)


@dataclass(frozen=True)
class Reader:
    """Reads batches into points; each rank reads its own batches.

    Args:
        features: computes the features of a batch.
        unit: scale features to norm 1, so that Euclidean distances rank examples as cosines do.
        any_number: whether labels may be numbers other than integers.
        device: the device of the model.
    """

    features: Features
    unit: bool
    any_number: bool
    device: torch.device

    def refuse_unfit_labels(self, batches: Iterable[Batch], kind: str) -> None:
        """Refuse unsuitable labels in the first batch, before the model runs."""
        for batch in batches:
            self._labels(batch, kind)
            return

    def __call__(
        self, batches: Iterable[Batch], kind: str, tick: Callable[[], Any] = lambda: None
    ) -> Points:
        """All examples, in their order.

        Args:
            batches: the batches of all ranks.
            kind: the kind of example, in errors.
            tick: called after each batch.
        """
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        start = 0
        for number, batch in enumerate(batches):
            indices = torch.arange(start, start + example_count(batch), device=self.device)
            start += len(indices)
            # a rank without batches of its own gets the number of features from the first batch
            if is_mine(number) or number == 0:
                kept = slice(None) if is_mine(number) else slice(0, 0)
                batch = to_device(batch, self.device)
                labels = self._labels(batch, kind)
                _refuse_non_finite(labels[:, None], indices, f"the label of {kind} example")
                features = self._scaled(self.features(batch), indices, kind)
                found.append((features[kept], labels[kept], indices[kept]))
            tick()
        if not found:
            raise InvalidArgumentError(f"there are no {kind} examples: the loader is empty")
        features, labels, indices = (torch.cat(parts) for parts in zip(*found, strict=True))
        order = gather_columns(indices).argsort()
        return Points(gather_columns(features.T).T[order], gather_columns(labels)[order])

    def _scaled(self, features: Tensor, indices: Tensor, kind: str) -> Tensor:
        _refuse_non_finite(features, indices, f"a feature of {kind} example")
        if not self.unit:
            return features
        wrong = (features == 0).all(dim=1)
        if wrong.any():
            raise NonFiniteError(
                f"the features of {kind} example {int(indices[wrong][0])} have norm 0, and so "
                'no cosine with others; name another `layer`, or use metric="euclidean"'
            )
        return unit_rows(features)

    def _labels(self, batch: Batch, kind: str) -> Tensor:
        labels = labels_of(batch)
        if labels.dim() == 2 and labels.shape[1] == 1:
            labels = labels.squeeze(1)
        fractions = labels.is_floating_point() and not self.any_number
        if labels.dim() == 1 and not fractions and not labels.is_complex():
            return labels
        advice = ". Give a sequence one label, or use a method of gradients"
        raise InvalidArgumentError(
            f"the labels of {kind} examples are {labels.dtype} of shape {list(labels.shape)}; each "
            'label must be one integer, or one number with utility="squared_error"'
            + (advice if labels.dim() > 1 else "")
        )


def _refuse_non_finite(rows: Tensor, indices: Tensor, what: str) -> None:
    finite = torch.isfinite(rows).all(dim=1)
    if not finite.all():
        raise NonFiniteError(f"{what} {int(indices[~finite][0])} is NaN or infinite")
