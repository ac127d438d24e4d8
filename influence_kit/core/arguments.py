"""Checks of arguments: counts, numbers, seeds, flags, texts, functions, sequences, dicts."""

import math
import operator
import reprlib
from collections.abc import Mapping, Set
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence_kit.errors import InvalidArgumentError

# what torch takes for a seed
SEEDS = range(-(2**63), 2**64)
DEEPEST = 64
PLAIN = (str, bytes, int, float, complex, list, tuple, dict, set, type(None))
_short = reprlib.Repr()
_short.maxother = _short.maxstring = 60


def shown(value: Any) -> str:
    """A value as errors show it: its beginning, and its type where the value does not show it."""
    # in one line; also of an object whose own `__repr__` fails
    written = " ".join(_short.repr(value).split())
    kind = type(value).__name__
    return written if isinstance(value, PLAIN) or kind in written else f"{written} ({kind})"


def check_count(
    value: Any, name: str, least: int = 1, instead: str = "", most: int | None = None
) -> int:
    """The argument as an int of at least ``least``.

    Args:
        value: what was given.
        name: the argument's name, for the error.
        least: the smallest value allowed.
        instead: what the argument may be in place of a number, for the error: '"auto"'.
        most: the largest value allowed; None for any.

    Raises:
        InvalidArgumentError: for anything else: a bool, a fraction, a number out of range.
    """
    is_int = isinstance(value, Integral) and not isinstance(value, bool)
    if not is_int or int(value) < least or (most is not None and int(value) > most):
        wanted = "a positive int" if least == 1 else f"an int of at least {least}"
        wanted += (
            f" and at most {most}" if is_int and most is not None and int(value) > most else ""
        )
        wanted += f" or {instead}" if instead else ""
        raise InvalidArgumentError(f"`{name}` must be {wanted}; got {shown(value)}")
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
    number = isinstance(value, Real) and not isinstance(value, bool) and _is_finite(value)
    if number and above < value < below and least <= value <= most:
        return value if isinstance(value, int) else float(value)
    start = {above: "a positive number", least: "a number that is not negative"}
    limits = {"above": above or math.inf, "at least": least or math.inf, "below": below}
    limits["at most"] = most
    known = [f"{word} {limit:g}" for word, limit in limits.items() if math.isfinite(limit)]
    wanted = " and ".join([start.get(0, "a finite number"), *known])
    wanted += f" or {instead}" if instead else ""
    if isinstance(value, Integral) and not _is_finite(value):
        wanted += ", written as a float where it has more than 64 bits"
    raise InvalidArgumentError(f"`{name}` must be {wanted}; got {shown(value)}")


def _is_finite(value: Any) -> bool:
    # torch has no ints beyond 64 bits
    return abs(int(value)) < 2**63 if isinstance(value, Integral) else math.isfinite(value)


def is_one_number(value: Any) -> bool:
    """Whether it is a real number, or a dense tensor of one; whole ones have at most 64 bits."""
    if isinstance(value, Tensor):
        real = not value.is_complex() and value.dtype != torch.bool
        dense = not value.is_meta and value.layout == torch.strided
        return value.numel() == 1 and real and dense
    if isinstance(value, Integral):
        return not isinstance(value, bool) and _is_finite(value)
    return isinstance(value, Real)


def is_finite_number(value: Any) -> bool:
    """The same, and neither NaN nor infinite."""
    return is_one_number(value) and math.isfinite(float(value))


def check_seed(value: Any) -> int:
    """A seed as an int.

    Raises:
        InvalidArgumentError: for anything else: torch would take 1.5 for 1.
    """
    try:
        seed = None if isinstance(value, bool) else operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        seed = None
    if seed is None:
        raise InvalidArgumentError(f"a seed must be an int; got {shown(value)}")
    if seed not in SEEDS:
        raise InvalidArgumentError(f"a seed must be an int of at most 64 bits; got {shown(value)}")
    return seed


def check_seeds(values: Any, name: str = "seeds") -> list[int]:
    """A sequence of seeds, at least one, as ints."""
    seeds = [check_seed(value) for value in check_sequence(values, name, "ints")]
    if not seeds:
        raise InvalidArgumentError(f"`{name}` is empty; at least one seed is needed")
    return seeds


def check_flag(value: Any, name: str) -> bool:
    """The argument as a bool.

    Raises:
        InvalidArgumentError: for anything else, also what Python takes for true or false.
    """
    if not isinstance(value, bool | np.bool_):
        raise InvalidArgumentError(f"`{name}` must be True or False; got {shown(value)}")
    return bool(value)


def check_text(value: Any, name: str, instead: str = "") -> str:
    """The argument, which must be a ``str``.

    Raises:
        InvalidArgumentError: for anything else.
    """
    if not isinstance(value, str):
        wanted = "a str" + (f" or {instead}" if instead else "")
        raise InvalidArgumentError(f"`{name}` must be {wanted}; got {shown(value)}")
    return value


def check_function(value: Any, name: str, call: str) -> Any:
    """The argument, which must be callable.

    Args:
        value: what was given.
        name: the argument's name, for the error.
        call: how it is called, for the error: "train_fn(indices, seed) -> model".

    Raises:
        InvalidArgumentError: for what cannot be called.
    """
    if not callable(value):
        raise InvalidArgumentError(
            f"`{name}` must be a function, called as {call}; got {shown(value)}"
        )
    return value


def check_sequence(value: Any, name: str, of: str, count: int | None = None) -> Any:
    """The argument, which must have a length and items by index: a list, tensor, array.

    Args:
        value: what was given.
        name: the argument's name, for the error.
        of: what the items are, for the error: "one label per example".
        count: how many there must be; None for any number.

    Raises:
        InvalidArgumentError: for a text, a mapping, a set, a generator, or another number of items.
    """
    wrong = isinstance(value, str | bytes | Mapping | Set | type)
    if wrong or not (hasattr(value, "__len__") and hasattr(value, "__getitem__")):
        raise InvalidArgumentError(
            f"`{name}` must be a list, a tensor or another sequence of {of}; got {shown(value)}"
        )
    try:
        length = len(value)
    except TypeError as error:  # a tensor or array without dimensions
        raise InvalidArgumentError(
            f"`{name}` must be a list, a tensor or another sequence of {of}; got a single value, "
            f"{shown(value)}"
        ) from error
    if isinstance(value, Tensor) and (value.is_meta or value.layout != torch.strided):
        kind = "meta" if value.is_meta else "sparse"
        raise InvalidArgumentError(
            f"`{name}` must be a dense tensor, or another sequence, of {of}; got a {kind} tensor "
            f"of shape {list(value.shape)}"
        )
    if count is not None and length != count:
        raise InvalidArgumentError(f"`{name}` has {length} items; there must be {count}, {of}")
    return value


def refuse_deep(value: Any, name: str) -> None:
    """Refuse lists in lists beyond any use, which functions that call themselves cannot follow."""
    item = value
    for _ in range(DEEPEST):
        if not isinstance(item, list | tuple) or not len(item):
            return
        item = item[0]
    raise InvalidArgumentError(
        f"`{name}` holds lists that are nested more than {DEEPEST} deep; pass tensors, or lists of "
        "numbers or examples"
    )


def check_texts(value: Any, name: str, of: str, count: int | None = None) -> list[str]:
    """The argument, which must be a sequence of ``str``, as a list."""
    return [
        check_text(item, f"{name}[{index}]")
        for index, item in enumerate(check_sequence(value, name, of, count))
    ]


def check_mapping(value: Any, name: str, of: str) -> dict[str, Any]:
    """The argument, which must be a mapping with ``str`` keys, not empty, as a dict.

    Args:
        value: what was given.
        name: the argument's name, for the error.
        of: what it must be, for the error: "{title: (predicted, actual)}".

    Raises:
        InvalidArgumentError: for anything else.
    """
    if not isinstance(value, Mapping):
        raise InvalidArgumentError(f"`{name}` must be a dict {of}; got {shown(value)}")
    if not value:
        raise InvalidArgumentError(f"`{name}` is empty; pass a dict {of}")
    other = [key for key in value if not isinstance(key, str)]
    if other:
        raise InvalidArgumentError(f"the keys of `{name}` must be str; got {shown(other[0])}")
    return dict(value)
