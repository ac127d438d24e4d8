"""What everything that an object keeps was made of, so that it is not used with anything else."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from influence_kit.checkpoints.loader import Fingerprint
from influence_kit.data.batches import Batch
from influence_kit.methods.data_fingerprint import what_changed

Source = Callable[[], dict[str, Any]]


class Given(NamedTuple):
    """A few examples, the outputs of the model for them, and their losses."""

    batch: Batch
    outputs: list[Tensor]
    losses: list[Tensor]


@dataclass
class Fingerprints:
    """Fingerprints: of the weights of checkpoints by number, of data and losses by argument.

    And what the model and the loss gave for a few examples, by number of the checkpoint.
    """

    weights: dict[int, Fingerprint] = field(default_factory=dict)
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)
    given: dict[int, Given] = field(default_factory=dict)

    def record(self, weights: Mapping[int, Fingerprint], sources: Mapping[str, Source]) -> None:
        """Note what has been used; what is known already stays.

        What of a data set differs between two looks at it, with nothing done in between (a random
        transform, a cache), says nothing of a change.
        """
        self.weights = {**weights, **self.weights}
        for name, source in sources.items():
            if name not in self.sources:
                found, again = source(), source()
                self.sources[name] = {key: v for key, v in found.items() if again.get(key) == v}

    def has_other_weights(self, number: int, fingerprint: Fingerprint) -> bool:
        """Whether a checkpoint holds other weights than it did."""
        known = self.weights.get(number, fingerprint)
        return len(known) != len(fingerprint) or any(
            old != new and not (math.isnan(old) and math.isnan(new))
            for old, new in zip(known, fingerprint, strict=True)
        )

    def other_source(self, sources: Mapping[str, Source]) -> str | None:
        """Which data set or loss is not what it was, and how; None where there is none."""
        for name, source in sources.items():
            if name in self.sources:
                change = what_changed(self.sources[name], source())
                if change is not None:
                    return f"`{name}` is not what it was ({change})"
        return None
