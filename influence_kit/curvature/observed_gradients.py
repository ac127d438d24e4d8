"""Gradients at slopes sampled from the model, or at the labels of the data, with statistics.

Shapes: n examples of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from influence_kit.core.memory import rows_within, workspace_bytes
from influence_kit.curvature.observations import LabelStatistics, Tally
from influence_kit.curvature.passes import Features
from influence_kit.curvature.sampled_slopes import OF_SLOPES, SampledSlopes
from influence_kit.data.batches import Batch, take
from influence_kit.gradients.per_example import Gradients
from influence_kit.losses.loss import Loss


@dataclass(frozen=True)
class ObservedGradients:
    """Gradients of batches, with the statistics of their labels.

    Args:
        prepare: detects the reduction of the loss, from a batch of the data.
        gradients: the gradients of a loss of a batch.
        slopes: samples slopes from the model.
        at_data: whether the labels of the data are used.
    """

    prepare: Callable[[Tensor, Batch], None]
    gradients: Callable[[Batch, Loss], Gradients]
    slopes: SampledSlopes
    at_data: bool

    def __call__(self, indices: Tensor, batch: Batch) -> tuple[Gradients, LabelStatistics | None]:
        """Gradients and statistics for indices ``[n]``; None if the loss is no known likelihood."""
        self.prepare(indices, batch)
        if self.at_data:
            return self.gradients(batch, self.slopes.loss), self.slopes.given(indices, batch)
        sampled, statistics = self.slopes.sampled(indices, batch)
        return self.gradients(sampled, OF_SLOPES), statistics

    def tallied(self, tally: Tally) -> Features:
        """The gradients only; the statistics are added to ``tally``."""

        def features(indices: Tensor, batch: Batch) -> Gradients:
            gradients, statistics = self(indices, batch)
            tally.add(int(indices[0]), gradients.n, statistics)
            return gradients

        return features

    def in_chunks(self, batches: Iterable[tuple[Tensor, Batch]], size: int) -> Iterator[Gradients]:
        """The gradients, a few examples at a time.

        Args:
            batches: batches with the indices of their examples.
            size: the number of entries of a gradient.
        """
        for indices, batch in batches:
            rows = rows_within(4 * workspace_bytes(indices.device), 8 * size)
            for some in torch.arange(len(indices), device=indices.device).split(rows):
                yield self(indices[some], take(batch, some))[0]
