"""Fingerprints of the weights, data, losses and outputs that cached results were computed from."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn
from typing_extensions import Self

from influence_kit.checkpoints.loader import Fingerprint
from influence_kit.data.batches import Batch, call_model
from influence_kit.losses.loss import Loss
from influence_kit.methods.data_fingerprint import what_changed
from influence_kit.preservation.training_flags import outputs_of

Source = Callable[[], dict[str, Any]]


class Given(NamedTuple):
    """A few examples, the outputs of the model for them, and their losses."""

    batch: Batch
    outputs: list[Tensor]
    losses: list[Tensor]

    @classmethod
    def of(cls, model: nn.Module, loss: Loss, batch: Batch) -> Self:
        """What a model and a loss return for a batch; empty lists where they fail."""
        outputs = outputs_of(lambda: call_model(model, batch))
        losses = outputs_of(lambda: loss.values(call_model(model, batch), batch))
        return cls(batch, outputs or [], losses or [])


@dataclass
class Fingerprints:
    """What the caches of an object were computed from.

    Attributes:
        weights: fingerprints of the weights, by index of the checkpoint.
        sources: fingerprints of data sets and losses, by argument.
        given: what model and loss return for a few examples, by index of the checkpoint.
    """

    weights: dict[int, Fingerprint] = field(default_factory=dict)
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)
    given: dict[int, Given] = field(default_factory=dict)

    def record(self, weights: Mapping[int, Fingerprint], sources: Mapping[str, Source]) -> None:
        """Add the fingerprints of what has been used; earlier entries stay.

        Each source is fingerprinted twice, and the parts that differ (a random transform, a cache)
        are left out: they do not show a change.
        """
        self.weights = {**weights, **self.weights}
        for name, source in sources.items():
            if name not in self.sources:
                found, again = source(), source()
                self.sources[name] = {key: v for key, v in found.items() if again.get(key) == v}

    def has_other_weights(self, number: int, fingerprint: Fingerprint) -> bool:
        """Whether the weights of a checkpoint differ from the recorded ones."""
        known = self.weights.get(number, fingerprint)
        return len(known) != len(fingerprint) or any(
            old != new and not (math.isnan(old) and math.isnan(new))
            for old, new in zip(known, fingerprint, strict=True)
        )

    def other_source(self, sources: Mapping[str, Source]) -> str | None:
        """Which data set or loss has changed since it was recorded, and how; None if none has."""
        for name, source in sources.items():
            if name in self.sources:
                change = what_changed(self.sources[name], source())
                if change is not None:
                    return f"`{name}` is not what it was ({change})"
        return None
