"""Gradients at labels sampled from the model, or at those of the data, with label statistics.

Shapes: n examples of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from influence_kit.core.memory import rows_within, workspace_bytes
from influence_kit.curvature.model_labels import ModelLabels
from influence_kit.curvature.observations import LabelStatistics, Tally
from influence_kit.curvature.passes import Features
from influence_kit.data.batches import Batch, take
from influence_kit.gradients.per_example import Gradients


@dataclass(frozen=True)
class ObservedGradients:
    """Gradients of batches, with the statistics of their labels.

    Args:
        prepare: detects the reduction of the loss, from a batch of the data.
        features: the gradients of a batch at its labels.
        labels: samples labels from the model.
        at_data: whether the labels of the data are used.
    """

    prepare: Callable[[Tensor, Batch], None]
    features: Features
    labels: ModelLabels
    at_data: bool

    def __call__(self, indices: Tensor, batch: Batch) -> tuple[Gradients, LabelStatistics | None]:
        """Gradients and statistics for indices ``[n]``; None if the loss is no known likelihood."""
        self.prepare(indices, batch)
        if self.at_data:
            return self.features(indices, batch), self.labels.given(indices, batch)
        drawn, statistics = self.labels.drawn(indices, batch)
        return self.features(indices, drawn), statistics

    def tallied(self, tally: Tally) -> Features:
        """The gradients only; the statistics are added to ``tally``."""

        def features(indices: Tensor, batch: Batch) -> Gradients:
            gradients, statistics = self(indices, batch)
            tally.add(int(indices[0]), statistics, gradients)
            return gradients

        return features

    def weighted(self, batches: Iterable[tuple[Tensor, Batch]], size: int) -> Iterator[Gradients]:
        """Gradients scaled so that their mean square is that over labels, in chunks.

        Args:
            batches: batches with the indices of their examples.
            size: the number of entries of a gradient.
        """
        for indices, batch in batches:
            rows = rows_within(4 * workspace_bytes(indices.device), 8 * size)
            for some in torch.arange(len(indices), device=indices.device).split(rows):
                gradients, statistics = self(indices[some], take(batch, some))
                if statistics is not None:
                    gradients = gradients.scaled(statistics.weights.sqrt().to(gradients.sample))
                yield gradients
