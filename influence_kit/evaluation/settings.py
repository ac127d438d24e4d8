"""Settings as JSON has them: the numbers and words in whatever holds them.

Numbers, strings, containers, small tensors, dataclasses, objects with attributes, partials and
functions with their closures are described by what is in them. Large tensors and data sets are
data: they are described by their kind and length, and the weights of a model not at all.
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
# said in full by what they print
PRINTED = (complex, bytes, range, slice, os.PathLike, torch.dtype, torch.device, torch.Size)
# what training may hold that sets nothing
LOCK = type(threading.Lock())
NO_SETTINGS = (logging.Logger, io.IOBase, torch.Generator, np.random.Generator, nn.Module, LOCK)
# larger tensors and containers are data
LARGE = 1000
# objects that are looked into before all of it is given up
MOST_OBJECTS = 5000


def describe_function(function: Callable[..., Any]) -> dict[str, Any]:
    """Name, code, and the settings that a function uses.

    Of functions with settings: a partial's arguments, default arguments, variables around it, the
    attributes of an object that is called, or whose method is.

    Raises:
        InvalidArgumentError: for a setting that cannot be described.
    """
    return _Description().of_function(function)


class _Description:
    """Describes values, each object once."""

    def __init__(self) -> None:
        # the objects themselves: an id may be given again
        self._seen: dict[int, Any] = {}

    def of_function(self, function: Any) -> dict[str, Any]:
        if isinstance(function, nn.Module):
            return self._of_module(function)
        uses: dict[str, Any] = {}
        while isinstance(function, functools.partial):
            given = {f"argument {place}": value for place, value in enumerate(function.args)}
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
        if not isinstance(function, types.FunctionType):  # written in another language
            return {"name": name, "uses": self._all(uses)} if uses else {"name": name}
        return {
            "name": name,
            "code": source_hash(function, kind),
            "uses": self._all({**_around(function), **uses}),
        }

    def _of_module(self, module: nn.Module) -> dict[str, Any]:
        """A module without its weights: a loss, say, with its settings and class weights."""
        own: dict[str, Any] = {
            name: value
            for name, value in vars(module).items()
            if isinstance(value, (*PLAIN, float)) and name != "training" and name[0] != "_"
        }
        if next(module.parameters(), None) is None:  # else buffers are state, as weights are
            own.update(module.named_buffers())
        return {"name": repr(module), "uses": self._all(own)}

    def _all(self, values: Mapping[Any, Any]) -> dict[str, Any]:
        """The values by name, without what is no setting."""
        named = {key if isinstance(key, str) else repr(key): value for key, value in values.items()}
        return {
            name: self.of_value(named[name], name)
            for name in sorted(named)
            if not isinstance(named[name], types.ModuleType) and not _is_foreign(named[name])
        }

    def of_value(self, value: Any, name: str) -> Any:
        """What JSON can hold of a value that is called so."""
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
        raise _refusal(name, value, "it shows neither attributes nor a value")


def _refusal(name: str, value: Any, why: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"the training function uses '{name}', a {type(value).__qualname__}, of which it cannot be "
        f"told whether it is the same another time ({why}): pass a `label` that names the training"
    )


def _around(function: types.FunctionType) -> dict[str, Any]:
    """The variables around a function, and its default arguments."""
    # also of code within: a comprehension is such code in some versions of Python
    names = {
        instruction.argval
        for code in nested(function.__code__)
        for instruction in dis.get_instructions(code)
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    }
    outside = {name: value for name, value in function.__globals__.items() if name in names}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # of a name without a value yet
            outside[name] = cell.cell_contents
    defaults = {
        parameter.name: parameter.default
        for parameter in inspect.signature(function).parameters.values()
        if parameter.default is not parameter.empty
    }
    return {**outside, **defaults}


def _attributes(value: Any) -> dict[str, Any]:
    """The attributes of an object: of its class, in its slots, and its own."""
    found = _of_class(type(value))
    for kind in type(value).__mro__:
        slots = getattr(kind, "__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            if hasattr(value, slot):
                found[slot] = getattr(value, slot)
    return {**found, **getattr(value, "__dict__", {})}


def _of_class(kind: type) -> dict[str, Any]:
    """The attributes of a user's class that are values, not methods."""
    return {
        name: value
        for base in reversed(kind.__mro__)
        if not _is_foreign(base)
        for name, value in vars(base).items()
        if not (name.startswith("__") or callable(value) or hasattr(value, "__get__"))
    }


def _is_foreign(value: Any) -> bool:
    """Whether a function or class is of a package, whose code is not a user's setting."""
    if not (inspect.isroutine(value) or inspect.isclass(value)):
        return False
    if isinstance(value, types.MethodType):  # an object of a user's may be behind it
        value = type(value.__self__) if not inspect.isclass(value.__self__) else value.__func__
    top = (getattr(value, "__module__", None) or "builtins").partition(".")[0]
    if top in sys.stdlib_module_names and top != "__main__":
        return True
    file = getattr(sys.modules.get(top), "__file__", None) or ""
    return top == "influence_kit" or "site-packages" in file or "dist-packages" in file


def _of_numbers(values: Any) -> Any:
    """A small tensor or array by a hash of its numbers, a large one by its shape."""
    kind = f"{values.dtype} {list(values.shape)}"
    if math.prod(values.shape) > LARGE:
        return kind
    # of float32, say, the shortest text that is read back as the same number
    text = repr(values.detach().cpu().tolist() if isinstance(values, Tensor) else values.tolist())
    return f"{kind} {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _length(value: Any) -> int | None:
    try:
        return len(value)
    except (TypeError, NotImplementedError):
        return None
