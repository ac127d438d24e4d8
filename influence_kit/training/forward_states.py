"""The random states before a model's training forward passes, for repeating its dropout."""

from typing import Any

import torch
from torch import Tensor, nn

# by device type; the CPU's always
RandomState = dict[str, Tensor]


def random_state(device: torch.device) -> RandomState:
    """The random state of torch on the CPU and on a device."""
    found = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    return found


def set_random_state(state: RandomState, device: torch.device) -> None:
    """Set what ``random_state`` has returned."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


class ForwardStates:
    """Hooks on a model that record the random state before each forward pass with gradients.

    A copy of the model that is made while the hooks are there (an average of weights, say) has them
    too, and records nothing.
    """

    def __init__(self) -> None:
        self._model: int | None = None
        self._handles: list[Any] = []
        self._before: RandomState | None = None
        self._found: list[RandomState | None] = []

    def __deepcopy__(self, memo: Any) -> "ForwardStates":
        return self

    def attach(self, model: nn.Module) -> None:
        """Put the hooks on the model, unless it takes none."""
        self.remove()
        self._model, self._found = id(model), []
        if isinstance(model, torch.jit.ScriptModule):
            return
        self._handles = [
            model.register_forward_pre_hook(self._begin, prepend=True),
            model.register_forward_hook(self._end),
        ]

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def take(self, count: int) -> list[RandomState | None]:
        """The states before the last ``count`` passes, and forget all; None: nothing was drawn."""
        found, self._found = self._found[-count:], []
        return found

    def _begin(self, module: nn.Module, args: Any) -> None:
        if id(module) == self._model and torch.is_grad_enabled():
            self._before = random_state(_device_of(module))

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        before, self._before = self._before, None
        if id(module) == self._model and before is not None:
            after = random_state(_device_of(module))
            same = all(torch.equal(after[kind], before[kind]) for kind in before)
            self._found.append(None if same else before)


def _device_of(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))
