"""Saves and restores the attributes of modules other than parameters, buffers and hooks.

Attributes are compared and restored by identity; lists, dicts, sets and objects among them also by
content, five levels deep; tensors and arrays that were changed in place by value; generators of
random numbers by their state.
"""

import random
import sys
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Sequence
from operator import eq, is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from influence_kit.core.functorch import outside_transforms

DEPTH = 5
CONTAINERS = (dict, list, set, deque, OrderedDict, defaultdict)
GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
# the attributes of ``nn.Module`` itself
OF_MODULES = frozenset(vars(nn.Module()))
_FOREIGN = {"torch", "numpy"} | (set(sys.stdlib_module_names) - {"types", "functools"})
# the items that an owner holds: by name or key, or in order
Contents = dict[Any, Any] | list[Any]
MISSING = object()


class Attributes:
    """The attributes of modules, which can be restored.

    Args:
        modules: the modules.
        tensors: parameters and buffers, whose values are restored elsewhere.
    """

    def __init__(self, modules: Sequence[nn.Module], tensors: Iterable[Tensor]) -> None:
        self._owners: list[Any] = []
        self._known: dict[int, Any] = {id(tensor): tensor for tensor in tensors}
        self._values: list[tuple[Any, int, Any]] = []
        # generators of random numbers, and their states
        self._generators: list[tuple[Any, Any]] = []
        for module in modules:
            self._owners.append(module)
            self._known[id(vars(module))] = module
        for module in modules:
            for value in own_attributes(module).values():
                self._look_at(value, DEPTH)
        self._start = self.contents()

    def _look_at(self, value: Any, depth: int) -> None:
        """Record a container, an object with attributes or a tensor, and everything inside it."""
        if id(value) in self._known or isinstance(value, nn.Module):
            return
        if isinstance(value, Tensor | np.ndarray):
            self._known[id(value)] = value
            self._values.append((value, _version(value), _copy(value)))
            return
        if isinstance(value, GENERATORS):
            self._known[id(value)] = value
            self._generators.append((value, _state(value)))
            return
        holds = type(value) in CONTAINERS or _has_attributes(value)
        if not depth or not (holds or type(value) is tuple):
            return
        self._known[id(value)] = value
        if holds:
            self._owners.append(value)
        inner = vars(value) if _has_attributes(value) else value
        for item in inner.values() if isinstance(inner, dict) else inner:
            self._look_at(item, depth - 1)

    def contents(self) -> list[Contents]:
        """The current contents of all owners."""
        return [held_by(owner) for owner in self._owners]

    def changed_since(self, before: Sequence[Contents]) -> dict[int, Contents]:
        """The numbers of the owners whose contents have changed, with their earlier contents."""
        return {
            number: held
            for number, (owner, held) in enumerate(zip(self._owners, before, strict=True))
            if not _same(held, owner)
        }

    def put_back(self, changed: dict[int, Contents]) -> None:
        """Restore the contents of some owners."""
        for number, held in changed.items():
            fill(self._owners[number], held)

    def put_back_values(self) -> None:
        """Undo in-place changes of the tensors and arrays that existed at the start."""
        for value, version, copy in self._values:
            if isinstance(value, np.ndarray):
                value[...] = copy
            elif _version(value) != version:
                with outside_transforms(), torch.no_grad():
                    value.copy_(copy)
        self._values = [(value, _version(value), copy) for value, _, copy in self._values]

    def restore(self) -> None:
        """Restore the contents that all owners had at the start."""
        self.put_back(self.changed_since(self._start))
        self.put_back_values()
        for generator, state in self._generators:
            _set_state(generator, state)

    def notes(self, changed: dict[int, Contents]) -> list[tuple[int, str]]:
        """Attributes of modules that record that something was done: now True, or a hook handle."""
        found = []
        for number, held in changed.items():
            owner = self._owners[number]
            if isinstance(owner, nn.Module):
                before = dict(held)
                for name, value in own_attributes(owner).items():
                    if _is_note(value) and before.get(name, MISSING) is not value:
                        found.append((number, name))
        return found

    def module_of(self, note: tuple[int, str]) -> nn.Module:
        """The module whose attribute a note is."""
        module: nn.Module = self._owners[note[0]]
        return module

    def keep(self, notes: Iterable[tuple[int, str]], changed: dict[int, Contents]) -> None:
        """Keep notes as they are now: treat these values as those of the start."""
        for number, name in notes:
            value = vars(self._owners[number])[name]
            for held in (self._start[number], changed[number]):
                assert isinstance(held, dict)
                held[name] = value


def own_attributes(module: nn.Module) -> dict[str, Any]:
    """A module's attributes without those of ``nn.Module``."""
    return {name: value for name, value in vars(module).items() if name not in OF_MODULES}


def _has_attributes(value: Any) -> bool:
    """Whether a value is an object of a user's class, with attributes of its own."""
    if isinstance(value, type | types.FunctionType | types.MethodType | types.ModuleType):
        return False
    home = type(value).__module__.partition(".")[0]
    return isinstance(getattr(value, "__dict__", None), dict) and home not in _FOREIGN


def _held(owner: Any) -> Any:
    """The dict, list, set or deque that holds an owner's contents."""
    return owner if type(owner) in CONTAINERS else vars(owner)


def held_by(owner: Any) -> Contents:
    """A copy of an owner's contents."""
    held = _held(owner)
    return dict(held) if isinstance(held, dict) else list(held)


def _same(before: Contents, owner: Any) -> bool:
    """Whether an owner holds the same objects."""
    held = _held(owner)
    if len(before) == len(held):
        if not isinstance(before, dict):
            return all(map(is_, before, held))
        # the usual case, and quick to check
        if all(map(is_, before.values(), held.values())) and all(map(eq, before, held)):
            return True
    if not isinstance(owner, nn.Module) or not isinstance(before, dict):
        return False
    own = {name: value for name, value in before.items() if name not in OF_MODULES}
    now = own_attributes(owner)
    return own.keys() == now.keys() and all(own[name] is now[name] for name in own)


def fill(owner: Any, before: Contents) -> None:
    """Replace an owner's contents by earlier ones."""
    held = _held(owner)
    if isinstance(owner, nn.Module):
        kept = {name: value for name, value in held.items() if name in OF_MODULES}
        before = {**dict(before), **kept}
    held.clear()
    if isinstance(held, list | deque):
        held.extend(before)
    else:
        held.update(before)


def _state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    is_numpys = isinstance(generator, np.random.RandomState)
    return generator.get_state() if is_numpys else generator.getstate()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)


def _is_note(value: Any) -> bool:
    if isinstance(value, list | tuple) and value:
        return all(isinstance(item, RemovableHandle) for item in value)
    return value is True or isinstance(value, RemovableHandle)


def _version(value: Any) -> int:
    if isinstance(value, np.ndarray) or value.is_inference():
        return 0
    version: int = value._version
    return version


def _copy(value: Any) -> Any:
    return value.copy() if isinstance(value, np.ndarray) else value.detach().clone()
