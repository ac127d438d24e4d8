"""Hooks that start each forward pass of a model from the same state, and protect its inputs.

What a forward pass leaves on modules (a cache filled from the weights, a stored output) is removed
before the next one: a cache would be used with the next checkpoint, and has no gradient. Until
then it stays, for a loss that reads it. Inputs are passed as copies, as forward may change them in
place, and which of them cannot be known beforehand.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from influence_kit.data.batches import map_tensors
from influence_kit.preservation.module_state import ModuleState

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


class RootHooks:
    """Hooks around the outermost calls of a model.

    Args:
        model: the model.
        state: the state of its modules; the attributes in which the model records its own hooks
            are kept there.
    """

    def __init__(self, model: nn.Module, state: ModuleState) -> None:
        self._model, self._state = model, state
        self._depth = 0
        self._before: list[Any] = []
        self._left: dict[int, Any] = {}
        self._hook_counts: list[int] = []

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside, the hooks are installed, except on scripted models, which take none."""
        if isinstance(self._model, torch.jit.ScriptModule):
            yield
            return
        handles = [
            self._model.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True),
            self._model.register_forward_hook(self._leave, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def undo(self) -> None:
        """Remove what the last forward pass left on modules."""
        self._state.attributes.put_back(self._left)
        self._state.attributes.put_back_values()
        self._left = {}

    def probed(self, probe: Callable[[], Any]) -> None:
        """Call the model, and let the caller inspect and remove what it leaves on modules."""
        try:
            probe()
        finally:
            self._left = {}

    def _enter(self, model: nn.Module, args: Any, kwargs: Any) -> Inputs | None:
        self._depth += 1
        if self._depth > 1:
            return None
        self.undo()
        self._before = self._state.attributes.contents()
        self._hook_counts = self._state.hooks.counts()
        inputs: Inputs = map_tensors((args, kwargs), Tensor.clone)
        return inputs

    def _leave(self, model: nn.Module, args: Any, output: Any) -> None:
        self._depth -= 1
        if self._depth > 0:
            return
        attributes = self._state.attributes
        self._left = attributes.changed_since(self._before)
        notes = attributes.notes(self._left)
        if notes:
            self._keep(notes)

    def _keep(self, notes: list[tuple[int, str]]) -> None:
        """Keep the attributes in which the model records the hooks that it installed."""
        hooked = self._state.hooks.grown_since(self._hook_counts)
        if hooked:
            attributes = self._state.attributes
            mine = [n for n in notes if hooked & set(attributes.module_of(n).modules())]
            attributes.keep(mine, self._left)
