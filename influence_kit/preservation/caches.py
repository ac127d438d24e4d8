"""Caches that are full when a call begins: they were computed from the user's own weights.

A tensor that a module holds in addition to its parameters and buffers may be a constant, or may
have been computed from the weights by an earlier forward pass. It would then be used, wrongly, with
every checkpoint. It is treated as such a cache, and emptied for the call, if a forward pass fills
it again with the same values.
"""

import weakref
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from influence_kit.preservation.attributes import CONTAINERS, MISSING, fill, held_by, own_attributes
from influence_kit.preservation.module_state import ModuleState
from influence_kit.preservation.training_flags import Probe, close

# a module and the name of an attribute
Slot = tuple[nn.Module, str]
# attributes found not to be caches, so that they are not tried again
_CONSTANTS: weakref.WeakKeyDictionary[nn.Module, dict[str, Any]] = weakref.WeakKeyDictionary()


def empty_caches(state: ModuleState, probe: Probe) -> None:
    """Empty the attributes that a forward pass of the model with the user's weights fills again.

    Args:
        state: the state of the model.
        probe: calls the model on a few examples.
    """
    known = {id(tensor) for tensor in state.values.tensors}
    slots = [
        (module, name)
        for module in state.modules
        for name, value in own_attributes(module).items()
        if _CONSTANTS.get(module, {}).get(name) is not value
        and any(id(tensor) not in known for tensor in _tensors(value))
    ]
    together = _filled_again(state, probe, slots, None) if slots else []
    for slot in slots:
        module, name = slot
        if slot in together or _filled_again(state, probe, [slot], None):
            _empty(slot, None)
        elif _filled_again(state, probe, [slot], MISSING):
            _empty(slot, MISSING)
        else:
            _CONSTANTS.setdefault(module, {})[name] = vars(module)[name]


def _filled_again(state: ModuleState, probe: Probe, slots: list[Slot], nothing: Any) -> list[Slot]:
    """The slots, all emptied, that a forward pass fills with the values that they had."""
    before, found = state.attributes.contents(), []
    values = {slot: vars(slot[0])[slot[1]] for slot in slots}
    held = {slot: list(_tensors(value)) for slot, value in values.items()}
    # a container may be newer than the saved state: ``eval()`` may have made one
    contents = [(value, held_by(value)) for value in values.values() if type(value) in CONTAINERS]
    try:
        for slot in slots:
            _empty(slot, nothing)
        with suppress(Exception), torch.no_grad():  # forward may need the values
            probe()
            found = [
                (module, name)
                for module, name in slots
                if close(list(_tensors(vars(module).get(name))), held[module, name])
            ]
    finally:
        state.attributes.put_back(state.attributes.changed_since(before))
        for value, inside in contents:
            fill(value, inside)
    return found


def _empty(slot: Slot, nothing: Any) -> None:
    module, name = slot
    value = vars(module)[name]
    if type(value) in CONTAINERS:
        value.clear()
    elif nothing is MISSING:
        del vars(module)[name]
    else:
        vars(module)[name] = nothing


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of an attribute: the attribute itself, or those in a container."""
    if isinstance(value, Tensor):
        yield value
    elif type(value) in (*CONTAINERS, tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)
