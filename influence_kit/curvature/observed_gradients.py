"""Gradients at drawn labels, or at those of the data, with what the labels say.

Shapes: n examples of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from influence_kit.core.memory import rows_within, workspace_bytes
from influence_kit.curvature.model_labels import ModelLabels
from influence_kit.curvature.observations import LabelFacts, Tally
from influence_kit.curvature.passes import Features
from influence_kit.data.batches import Batch, take
from influence_kit.gradients.per_example import Gradients


@dataclass(frozen=True)
class ObservedGradients:
    """Gradients of batches whose labels are known as observations.

    Args:
        prepare: settles what the loss returns, from a batch of the data.
        features: gradients of a batch at the labels that it has.
        labels: draws them.
        at_data: whether the labels of the data stay.
    """

    prepare: Callable[[Tensor, Batch], None]
    features: Features
    labels: ModelLabels
    at_data: bool

    def __call__(self, places: Tensor, batch: Batch) -> tuple[Gradients, LabelFacts | None]:
        """Of examples at indices ``[n]``; no facts where the loss is no known likelihood."""
        self.prepare(places, batch)
        if self.at_data:
            return self.features(places, batch), self.labels.given(places, batch)
        drawn, facts = self.labels.drawn(places, batch)
        return self.features(places, drawn), facts

    def tallied(self, tally: Tally) -> Features:
        """The gradients alone; ``tally`` takes note of the labels."""

        def features(places: Tensor, batch: Batch) -> Gradients:
            gradients, facts = self(places, batch)
            tally.add(int(places[0]), facts, gradients)
            return gradients

        return features

    def weighted(self, batches: Iterable[tuple[Tensor, Batch]], size: int) -> Iterator[Gradients]:
        """Gradients that stand for what they are on average over labels, a few at a time.

        Args:
            batches: with the places of their examples.
            size: how many entries a gradient has.
        """
        for places, batch in batches:
            rows = rows_within(4 * workspace_bytes(places.device), 8 * size)
            for some in torch.arange(len(places), device=places.device).split(rows):
                gradients, facts = self(places[some], take(batch, some))
                if facts is not None:
                    gradients = gradients.scaled(facts.weights.sqrt().to(gradients.sample))
                yield gradients
