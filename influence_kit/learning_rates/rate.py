"""A learning rate, where it was found, and whether it is the one that was applied."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from influence_kit.core.arguments import is_one_number, shown
from influence_kit.errors import InvalidArgumentError

STORED, APPLIED, ESTIMATED, NONE = "stored", "applied", "estimated", "none"
# the keys under which users store a learning rate with the weights
RATE_KEYS = ("learning_rate", "lr")


@dataclass(frozen=True)
class Rate:
    """The learning rate that weights a checkpoint.

    Args:
        value: the rate; 1 if none was found.
        source: where it was found.
        kind: "stored" by the user with the weights; "applied" in the last step before the
            checkpoint was saved; "estimated", so it may differ from the applied one; "none".
        expected: whether the checkpoint is of a trainer that has a learning rate, so that there is
            a warning if it is missing.
    """

    value: float = 1.0
    source: str = "none found: 1"
    kind: str = NONE
    expected: bool = False

    def warning(self, label: str) -> str | None:
        """The text of a warning to the user, or None."""
        if self.kind == ESTIMATED:
            problem = (
                f"the learning rate that was applied before checkpoint {label} is not known and "
                f"is estimated as {self.value:g} ({self.source})"
            )
        elif self.kind == NONE and self.expected:
            problem = f"checkpoint {label} holds no learning rate and is weighted by 1"
        else:
            return None
        return (
            f"{problem}; scores in which checkpoints are weighted by their learning rate depend on "
            "it. Store it as 'learning_rate' (with the Trainer: log at each step that saves), or "
            "pass a `checkpoints_load_func` that returns it"
        )


NO_RATE = Rate()


def one_rate(rates: Iterable[float]) -> float:
    """The learning rate that all parameter groups share.

    Raises:
        InvalidArgumentError: if they differ.
    """
    distinct = sorted({float(rate) for rate in rates})
    if len(distinct) > 1:
        raise InvalidArgumentError(
            f"a checkpoint's optimizer state has several learning rates, {distinct}; store the one "
            "to use as 'learning_rate', or pass a `checkpoints_load_func`"
        )
    return distinct[0]


def stored_rate(saved: Mapping[str, Any]) -> Rate | None:
    """The learning rate that a user stored with the weights; None if there is none.

    Raises:
        InvalidArgumentError: if it is not one number.
    """
    for key in RATE_KEYS:
        value = saved.get(key)
        if value is None:
            continue
        if not is_one_number(value):
            raise InvalidArgumentError(
                f"a checkpoint's '{key}' is {shown(value)}; it must be the learning rate, one "
                "number (with several parameter groups, the one that weights the checkpoint)"
            )
        return Rate(float(value), f"stored as '{key}'", STORED)
    return None
