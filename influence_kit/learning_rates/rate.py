"""A learning rate, where it was found, and whether it is the one that was applied."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from influence_kit.errors import InvalidArgumentError

STORED, APPLIED, ESTIMATED, NONE = "stored", "applied", "estimated", "none"
# where users store a rate beside the weights
RATE_KEYS = ("learning_rate", "lr")


@dataclass(frozen=True)
class Rate:
    """The learning rate that weighs a checkpoint.

    Args:
        value: the rate; 1 where none was found.
        source: where it was found.
        kind: "stored" by the user beside the weights; "applied" in the last step before the
            checkpoint was saved; "estimated", so that it may differ from the applied one; "none".
        expected: whether the checkpoint is of a trainer that has a rate, so that a missing one is
            worth a warning.
    """

    value: float = 1.0
    source: str = "none found: 1"
    kind: str = NONE
    expected: bool = False

    def warning(self, label: str) -> str | None:
        """What to tell the user, if anything."""
        if self.kind == ESTIMATED:
            problem = (
                f"the learning rate that was applied before checkpoint {label} is not known and "
                f"is estimated as {self.value:g} ({self.source})"
            )
        elif self.kind == NONE and self.expected:
            problem = f"checkpoint {label} holds no learning rate and counts with rate 1"
        else:
            return None
        return (
            f"{problem}; scores that weigh checkpoints by their rate depend on it. Store the rate "
            "as 'learning_rate' (Trainer: log in each step that saves), or pass a "
            "`checkpoints_load_func` that returns it"
        )


NO_RATE = Rate()


def is_one_number(value: Any) -> bool:
    """Whether ``value`` is a real number, or a tensor of one."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex() and value.dtype != torch.bool
    return isinstance(value, Real) and not isinstance(value, bool)


def one_rate(rates: Iterable[float]) -> float:
    """The one rate of all parameter groups.

    Raises:
        InvalidArgumentError: where they differ.
    """
    distinct = sorted({float(rate) for rate in rates})
    if len(distinct) > 1:
        raise InvalidArgumentError(
            f"a checkpoint's optimizer state has several learning rates, {distinct}; store the one "
            "that counts as 'learning_rate', or pass a `checkpoints_load_func`"
        )
    return distinct[0]


def stored_rate(saved: Mapping[str, Any]) -> Rate | None:
    """The rate that a user stored beside the weights.

    Raises:
        InvalidArgumentError: where it is not one number.
    """
    for key in RATE_KEYS:
        value = saved.get(key)
        if value is None:
            continue
        if not is_one_number(value):
            raise InvalidArgumentError(
                f"a checkpoint's '{key}' is {value!r}; it must be the learning rate, one number "
                "(with several parameter groups, the rate that weighs the checkpoint)"
            )
        return Rate(float(value), f"stored as '{key}'", STORED)
    return None
