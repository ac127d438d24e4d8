"""Checks of numeric arguments: counts, and real numbers within a range."""

import math
from numbers import Integral, Real
from typing import Any

from influence_kit.errors import InvalidArgumentError


def check_count(value: Any, name: str, least: int = 1, instead: str = "") -> int:
    """The argument as an int of at least ``least``.

    Args:
        value: what was given.
        name: the argument's name, for the error.
        least: the smallest value allowed.
        instead: what the argument may be in place of a number, for the error: '"auto"'.

    Raises:
        InvalidArgumentError: for anything else: a bool, a fraction, a number below ``least``.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        wanted = "a positive int" if least == 1 else f"an int of at least {least}"
        wanted += f" or {instead}" if instead else ""
        raise InvalidArgumentError(f"`{name}` must be {wanted}; got {value!r}")
    return int(value)


def check_number(
    value: Any,
    name: str,
    *,
    above: float = -math.inf,
    least: float = -math.inf,
    below: float = math.inf,
    most: float = math.inf,
    instead: str = "",
) -> float:
    """The argument as a finite number within its range.

    Args:
        value: what was given.
        name: the argument's name, for the error.
        above: the number must be larger than this.
        least: it must be at least this.
        below: it must be smaller than this.
        most: it must be at most this.
        instead: what the argument may be in place of a number, for the error: '"auto"'.

    Raises:
        InvalidArgumentError: for anything else: a bool, NaN, infinity, a number out of range.
    """
    number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if number and above < value < below and least <= value <= most:
        return value if isinstance(value, int) else float(value)
    start = {above: "a positive number", least: "a number that is not negative"}
    limits = {"above": above or math.inf, "of at least": least or math.inf, "below": below}
    limits["of at most"] = most
    known = [f"{word} {limit:g}" for word, limit in limits.items() if math.isfinite(limit)]
    wanted = " and ".join([start.get(0, "a finite number"), *known])
    wanted += f" or {instead}" if instead else ""
    raise InvalidArgumentError(f"`{name}` must be {wanted}; got {value!r}")
