"""Each forward pass of a model starts from the same state, and leaves the data as it was.

What a forward pass leaves on modules (a cache filled from the weights, a kept output) is taken away
before the next one: a cache would serve the next checkpoint, and has no gradient. What it leaves is
there in between, for a loss that reads it. Inputs are handed over as copies, which forward may
change in place: at which of them it will do so cannot be known before.
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
    """Hooks of a model, around its outermost calls.

    Args:
        model: the model.
        state: of its modules; it learns which notes of the model's own are to stay.
    """

    def __init__(self, model: nn.Module, state: ModuleState) -> None:
        self._model, self._state = model, state
        self._depth = 0
        self._before: list[Any] = []
        self._left: dict[int, Any] = {}
        self._hook_counts: list[int] = []

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The hooks are on while inside; scripted models take none, and keep no attributes."""
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
        """Take away what the last forward pass left on modules."""
        self._state.attributes.put_back(self._left)
        self._state.attributes.put_back_values()
        self._left = {}

    def probed(self, probe: Callable[[], Any]) -> None:
        """Call the model, and forget what it would have left: what is there is to be looked at."""
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
        """Let the model's notes of hooks stay where it has installed them, as the hooks do."""
        hooked = self._state.hooks.grown_since(self._hook_counts)
        if hooked:
            attributes = self._state.attributes
            mine = [n for n in notes if hooked & set(attributes.module_of(n).modules())]
            attributes.keep(mine, self._left)
