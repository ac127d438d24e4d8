"""Caches that are full when a call begins: they hold what belongs to the user's own weights.

A tensor that a module keeps beside its parameters and buffers may be a constant, or may have been
computed from the weights by an earlier forward pass, which would then serve every checkpoint. It is
taken for the latter, and emptied for the call, where forward fills it again with the same values.
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

Place = tuple[nn.Module, str]
# what was found not to be a cache, so that it is tried once alone
_CONSTANTS: weakref.WeakKeyDictionary[nn.Module, dict[str, Any]] = weakref.WeakKeyDictionary()


def empty_caches(state: ModuleState, probe: Probe) -> None:
    """Empty what a forward pass of the model fills again, the user's weights being in it.

    Args:
        state: of the model.
        probe: calls the model on a few examples.
    """
    known = {id(tensor) for tensor in state.values.tensors}
    places = [
        (module, name)
        for module in state.modules
        for name, value in own_attributes(module).items()
        if _CONSTANTS.get(module, {}).get(name) is not value
        and any(id(tensor) not in known for tensor in _tensors(value))
    ]
    together = _filled_again(state, probe, places, None) if places else []
    for place in places:
        module, name = place
        if place in together or _filled_again(state, probe, [place], None):
            _empty(place, None)
        elif _filled_again(state, probe, [place], MISSING):
            _empty(place, MISSING)
        else:
            _CONSTANTS.setdefault(module, {})[name] = vars(module)[name]


def _filled_again(
    state: ModuleState, probe: Probe, places: list[Place], nothing: Any
) -> list[Place]:
    """The places that a forward pass fills with what they held, all of them being empty before."""
    before, found = state.attributes.contents(), []
    values = {place: vars(place[0])[place[1]] for place in places}
    held = {place: list(_tensors(value)) for place, value in values.items()}
    # a container may be younger than what the state knows of: one that ``eval()`` has made
    contents = [(value, held_by(value)) for value in values.values() if type(value) in CONTAINERS]
    try:
        for place in places:
            _empty(place, nothing)
        with suppress(Exception), torch.no_grad():  # forward needs what is there
            probe()
            found = [
                (module, name)
                for module, name in places
                if close(list(_tensors(vars(module).get(name))), held[module, name])
            ]
    finally:
        state.attributes.put_back(state.attributes.changed_since(before))
        for value, inside in contents:
            fill(value, inside)
    return found


def _empty(place: Place, nothing: Any) -> None:
    module, name = place
    value = vars(module)[name]
    if type(value) in CONTAINERS:
        value.clear()
    elif nothing is MISSING:
        del vars(module)[name]
    else:
        vars(module)[name] = nothing


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of an attribute: itself, or those in a container."""
    if isinstance(value, Tensor):
        yield value
    elif type(value) in (*CONTAINERS, tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)
