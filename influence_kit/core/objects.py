"""Checks of arguments that are not numbers: models, functions, words, paths, flags of a call."""

import errno
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from influence_kit.core.arguments import check_flag, check_function, shown
from influence_kit.errors import InvalidArgumentError


def check_model(value: Any, name: str = "model") -> nn.Module:
    """The argument, which must be a model.

    Raises:
        InvalidArgumentError: for anything else, also the class of a model.
    """
    if isinstance(value, nn.Module):
        return value
    is_class = isinstance(value, type) and issubclass(value, nn.Module)
    what = f"the class {value.__name__}: make an object of it" if is_class else shown(value)
    raise InvalidArgumentError(f"`{name}` must be a torch.nn.Module; got {what}")


def check_functions(values: Mapping[str, Any], call: str) -> None:
    """Refuse what is neither None nor callable, by the argument's name."""
    for name, value in values.items():
        if isinstance(value, type):
            raise InvalidArgumentError(
                f"`{name}` must be a function, called as {call}; got the class {value.__name__}: "
                f"pass an object of it, {value.__name__}()"
            )
        if value is not None:
            check_function(value, name, call)


def check_flags(values: Mapping[str, Any]) -> None:
    """Refuse what is not True or False, by the argument's name."""
    for name, value in values.items():
        check_flag(value, name)


def check_flags_of_call(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    """Refuse what is not True or False, of all arguments of a method that are annotated ``bool``.

    Args:
        function: the method.
        args: its positional arguments, after ``self``.
        kwargs: its keyword arguments.
    """
    names, flags = _names_and_flags(function)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    check_flags({name: value for name, value in given.items() if name in flags})


@cache
def _names_and_flags(function: Callable[..., Any]) -> tuple[list[str], set[str]]:
    parameters = list(inspect.signature(function).parameters.values())[1:]
    flags = {parameter.name for parameter in parameters if parameter.annotation in (bool, "bool")}
    return [parameter.name for parameter in parameters], flags


def check_path(value: Any, name: str, instead: str = "") -> Path:
    """The argument as a path.

    Args:
        value: what was given.
        name: the argument's name, for the error.
        instead: what the argument may be in place of a path, for the error: "None".

    Raises:
        InvalidArgumentError: for anything but a ``str`` or ``Path`` that a file system can hold.
    """
    problem = None if isinstance(value, str | PathLike) else ""
    try:
        os.lstat("" if problem is not None else value)
    except ValueError as error:  # a zero, or half a character of UTF-16
        problem = f" ({error})"
    except OSError as error:
        problem = f" ({error.strerror})" if error.errno == errno.ENAMETOOLONG else problem
    if problem is not None:
        wanted = "a path, a str or pathlib.Path" + (f", or {instead}" if instead else "")
        raise InvalidArgumentError(f"`{name}` must be {wanted}; got {shown(value)}{problem}")
    return Path(value)


def check_dtype(value: Any, name: str) -> torch.dtype:
    """The argument, which must be a torch.dtype."""
    if not isinstance(value, torch.dtype):
        raise InvalidArgumentError(
            f"`{name}` must be a torch.dtype, such as torch.float16, or None; got {shown(value)}"
        )
    return value


def is_one_of(value: Any, words: Sequence[Any]) -> bool:
    """Whether the argument is one of a few words, also where it is something without ``==``."""
    return any(value is word or (isinstance(value, str) and value == word) for word in words)
