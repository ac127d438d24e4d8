"""How a user trains a model, and what tells one way of training from another."""

import functools
import hashlib
import inspect
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

TrainFunction = Callable[[Tensor, int], nn.Module]
Measure = Callable[[nn.Module], Tensor]
PLAIN = (bool, int, float, str)


@runtime_checkable
class TrainsMany(Protocol):
    """A training function that can also train several models at once."""

    def __call__(self, indices: Tensor, seed: int) -> nn.Module:
        """The model trained on the examples at ``indices``."""
        ...

    def make_model(self) -> nn.Module:
        """A new model, not trained."""
        ...

    def at_once_of(self, size: int) -> int:
        """How many models on ``size`` examples each to train at once."""
        ...

    def train_many(self, subsets: Sequence[Tensor], seeds: Sequence[int]) -> Iterator[nn.Module]:
        """The models trained on subsets of one size."""
        ...

    def describe(self) -> dict[str, Any]:
        """What tells this training from another, as JSON has it."""
        ...


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's random state set by ``seed`` inside, and as it was afterwards."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def describe(train_fn: TrainFunction, label: str | None) -> dict[str, Any]:
    """What tells a training function from another: its label, or what is known of it."""
    if label is not None:
        return {"label": label}
    if isinstance(train_fn, TrainsMany):
        return train_fn.describe()
    return {"train_fn": describe_function(train_fn)}


def describe_function(function: Callable[..., Any]) -> dict[str, Any]:
    """Name, code, and the numbers, booleans and strings that a function uses.

    Of functions with settings: a partial's arguments, default arguments, variables around it, and
    the attributes of an object that is called.
    """
    if isinstance(function, nn.Module):
        return {"name": repr(function), "uses": _plain(vars(function))}
    uses: dict[str, Any] = {}
    while isinstance(function, functools.partial):
        given = {f"argument {place}": value for place, value in enumerate(function.args)}
        uses = {**given, **function.keywords, **uses}
        function = function.func
    name = getattr(function, "__qualname__", type(function).__qualname__)
    if inspect.isclass(function):
        function = function.__init__
    elif not inspect.isroutine(function):
        uses = {**getattr(function, "__dict__", {}), **uses}
        function = type(function).__call__
    function = inspect.unwrap(function)
    code = getattr(function, "__code__", None)
    if code is None:  # written in another language
        return {"name": name}
    outside = inspect.getclosurevars(function)
    defaults = {p.name: p.default for p in inspect.signature(function).parameters.values()}
    uses = {**outside.globals, **outside.nonlocals, **defaults, **uses}
    return {"name": name, "code": code_hash(code), "uses": _plain(uses)}


def _plain(uses: dict[str, Any]) -> dict[str, Any]:
    return {key: uses[key] for key in sorted(uses) if isinstance(uses[key], PLAIN)}


def code_hash(code: types.CodeType) -> str:
    """A hash of what a function does, not of where it stands or how it is laid out."""
    digest = hashlib.sha256(code.co_code)
    for item in (*code.co_consts, code.co_names, code.co_varnames):
        if isinstance(item, types.CodeType):
            text = code_hash(item)
        else:
            # the order of a set is another in each process
            text = str(sorted(map(repr, item))) if isinstance(item, frozenset) else repr(item)
        digest.update(text.encode())
    return digest.hexdigest()[:16]
