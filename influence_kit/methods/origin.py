"""What everything that an object keeps was made of, so that it is not used with anything else."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from influence_kit.checkpoint_loader import Fingerprint
from influence_kit.methods.data_fingerprint import data_fingerprint, what_changed


@dataclass
class Origin:
    """Fingerprints of the weights of checkpoints, by their number, and of data sets, by name."""

    weights: dict[int, Fingerprint] = field(default_factory=dict)
    data: dict[str, dict[str, Any]] = field(default_factory=dict)

    def record(self, weights: Mapping[int, Fingerprint], data: Mapping[str, Any]) -> None:
        """Note what has been used; what is known already stays.

        What of a data set differs between two looks at it, with nothing done in between (a random
        transform, a cache), says nothing of a change.
        """
        self.weights = {**weights, **self.weights}
        for name, source in data.items():
            if name not in self.data:
                found, again = data_fingerprint(source), data_fingerprint(source)
                self.data[name] = {key: v for key, v in found.items() if again.get(key) == v}

    def has_other_weights(self, number: int, fingerprint: Fingerprint) -> bool:
        """Whether a checkpoint holds other weights than it did."""
        known = self.weights.get(number, fingerprint)
        return len(known) != len(fingerprint) or any(
            old != new and not (math.isnan(old) and math.isnan(new))
            for old, new in zip(known, fingerprint, strict=True)
        )

    def other_data(self, data: Mapping[str, Any]) -> str | None:
        """Which data set is not what it was, and how; None where there is none."""
        for name, source in data.items():
            if name in self.data:
                change = what_changed(self.data[name], data_fingerprint(source))
                if change is not None:
                    return f"`{name}` is not what it was ({change})"
        return None
