"""The settings of a training function, in values that JSON can hold.

Numbers, strings, containers, small tensors, dataclasses, objects with attributes, partials and
functions with their closures are described by their contents. Large tensors and data sets are data,
described by type and length; the weights of a model are not described at all.
"""

import contextlib
import dis
import enum
import functools
import hashlib
import inspect
import io
import logging
import math
import os
import sys
import threading
import types
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation.source_hash import nested, source_hash

PLAIN = (bool, int, str, types.NoneType)
# described in full by their repr
PRINTED = (complex, bytes, range, slice, os.PathLike, torch.dtype, torch.device, torch.Size)
# objects that a training function may hold, and that are not settings
LOCK = type(threading.Lock())
NO_SETTINGS = (logging.Logger, io.IOBase, torch.Generator, np.random.Generator, nn.Module, LOCK)
# tensors and containers with more items are data
LARGE = 1000
# the most objects that are described
MOST_OBJECTS = 5000


def describe_function(function: Callable[..., Any]) -> dict[str, Any]:
    """Name, source hash, and the settings that a function uses.

    Settings are the arguments of a partial, default arguments, variables of enclosing scopes, and
    the attributes of the object that is called or whose method is called.

    Raises:
        InvalidArgumentError: for a setting that cannot be described.
    """
    return _Description().of_function(function)


class _Description:
    """Describes values, each object once."""

    def __init__(self) -> None:
        # the objects themselves, since ids are reused
        self._seen: dict[int, Any] = {}

    def of_function(self, function: Any) -> dict[str, Any]:
        if isinstance(function, nn.Module):
            return self._of_module(function)
        uses: dict[str, Any] = {}
        while isinstance(function, functools.partial):
            given = {f"argument {index}": value for index, value in enumerate(function.args)}
            uses = {**given, **function.keywords, **uses}
            function = function.func
        name = getattr(function, "__qualname__", type(function).__qualname__)
        owner = getattr(function, "__self__", None)
        if isinstance(function, types.MethodType) and not inspect.isclass(owner):
            uses = {**_attributes(owner), **uses}
        kind = function if inspect.isclass(function) else None
        if kind is not None:
            uses = {**_of_class(kind), **uses}
            function = kind.__init__
        elif not inspect.isroutine(function):
            uses = {**_attributes(function), **uses}
            function = type(function).__call__
        function = inspect.unwrap(function)
        if not isinstance(function, types.FunctionType):  # written in C
            return {"name": name, "uses": self._all(uses)} if uses else {"name": name}
        return {
            "name": name,
            "code": source_hash(function, kind),
            "uses": self._all({**_around(function), **uses}),
        }

    def _of_module(self, module: nn.Module) -> dict[str, Any]:
        """A module without its weights, such as a loss with its settings and class weights."""
        own: dict[str, Any] = {
            name: value
            for name, value in vars(module).items()
            if isinstance(value, (*PLAIN, float)) and name != "training" and name[0] != "_"
        }
        if next(module.parameters(), None) is None:  # otherwise buffers are state, like weights
            own.update(module.named_buffers())
        return {"name": repr(module), "uses": self._all(own)}

    def _all(self, values: Mapping[Any, Any]) -> dict[str, Any]:
        """The values by name, without those that are not settings."""
        named = {key if isinstance(key, str) else repr(key): value for key, value in values.items()}
        return {
            name: self.of_value(named[name], name)
            for name in sorted(named)
            if not isinstance(named[name], types.ModuleType) and not _is_foreign(named[name])
        }

    def of_value(self, value: Any, name: str) -> Any:
        """A value of that name, described in values that JSON can hold."""
        if isinstance(value, enum.Enum):
            return str(value)
        if isinstance(value, float):
            return value if math.isfinite(value) else repr(value)
        if isinstance(value, PLAIN):
            return value
        if isinstance(value, PRINTED):
            return repr(value)
        if isinstance(value, np.generic):
            return self.of_value(value.item(), name)
        if isinstance(value, Tensor | np.ndarray):
            return _of_numbers(value)
        if id(value) in self._seen:
            return f"the same {type(value).__qualname__} as before"
        self._seen[id(value)] = value
        if len(self._seen) > MOST_OBJECTS:
            raise _refusal(name, value, f"there are more than {MOST_OBJECTS} objects in it")
        return self._of_object(value, name)

    def _of_object(self, value: Any, name: str) -> Any:
        kind = type(value).__qualname__
        if isinstance(value, NO_SETTINGS):
            return self._of_module(value) if isinstance(value, nn.Module) else kind
        length = _length(value)
        if isinstance(value, Dataset | DataLoader) or (length or 0) > LARGE:
            return {"kind": kind, "length": length}
        if isinstance(value, Mapping):
            return self._all(value)
        if isinstance(value, list | tuple):
            return [self.of_value(item, name) for item in value]
        if isinstance(value, set | frozenset):
            return sorted(repr(self.of_value(item, name)) for item in value)
        if callable(value):
            return self.of_function(value)
        attributes = _attributes(value)
        if attributes or hasattr(value, "__dict__"):
            return {"kind": kind, **self._all(attributes)}
        if " at 0x" not in repr(value):
            return repr(value)
        raise _refusal(name, value, "it has neither attributes nor a readable repr")


def _refusal(name: str, value: Any, why: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"the training function uses '{name}', a {type(value).__qualname__}, which cannot be "
        f"compared with that of another run ({why}): pass a `label` that names the training"
    )


def _around(function: types.FunctionType) -> dict[str, Any]:
    """The globals and enclosing variables that a function uses, and its default arguments."""
    # also of nested code: comprehensions are nested code in some versions of Python
    names = {
        instruction.argval
        for code in nested(function.__code__)
        for instruction in dis.get_instructions(code)
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    }
    outside = {name: value for name, value in function.__globals__.items() if name in names}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # a name without a value yet
            outside[name] = cell.cell_contents
    defaults = {
        parameter.name: parameter.default
        for parameter in inspect.signature(function).parameters.values()
        if parameter.default is not parameter.empty
    }
    return {**outside, **defaults}


def _attributes(value: Any) -> dict[str, Any]:
    """The attributes of an object: those of its class, in its slots, and its own."""
    found = _of_class(type(value))
    for kind in type(value).__mro__:
        slots = getattr(kind, "__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            if hasattr(value, slot):
                found[slot] = getattr(value, slot)
    return {**found, **getattr(value, "__dict__", {})}


def _of_class(kind: type) -> dict[str, Any]:
    """The attributes of a user's class that are values rather than methods."""
    return {
        name: value
        for base in reversed(kind.__mro__)
        if not _is_foreign(base)
        for name, value in vars(base).items()
        if not (name.startswith("__") or callable(value) or hasattr(value, "__get__"))
    }


def _is_foreign(value: Any) -> bool:
    """Whether a function or class belongs to an installed package, not to the user."""
    if not (inspect.isroutine(value) or inspect.isclass(value)):
        return False
    if isinstance(value, types.MethodType):  # it may be bound to a user's object
        value = type(value.__self__) if not inspect.isclass(value.__self__) else value.__func__
    top = (getattr(value, "__module__", None) or "builtins").partition(".")[0]
    if top in sys.stdlib_module_names and top != "__main__":
        return True
    file = getattr(sys.modules.get(top), "__file__", None) or ""
    return top == "influence_kit" or "site-packages" in file or "dist-packages" in file


def _of_numbers(values: Any) -> Any:
    """A small tensor or array by a hash of its values, a large one by its shape."""
    kind = f"{values.dtype} {list(values.shape)}"
    if math.prod(values.shape) > LARGE:
        return kind
    # repr gives the shortest text that is read back as the same number
    text = repr(values.detach().cpu().tolist() if isinstance(values, Tensor) else values.tolist())
    return f"{kind} {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _length(value: Any) -> int | None:
    try:
        return len(value)
    except (TypeError, NotImplementedError):
        return None
