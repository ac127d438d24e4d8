"""Uses a model and restores it afterwards: weights, flags, attributes, hooks, random states."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch
from torch import nn

from influence_kit.core.locks import alone_with
from influence_kit.core.random_states import same_random_states
from influence_kit.preservation.caches import empty_caches
from influence_kit.preservation.module_state import ModuleState
from influence_kit.preservation.root_hooks import RootHooks
from influence_kit.preservation.training_flags import Probe, TrainingFlags

Loaded = TypeVar("Loaded")


class Borrowed:
    """A model that is in use, with its saved state.

    Args:
        model: the model.
        eval_mode: whether it is used in evaluation mode.
        probe: calls the model on a few examples. Its outputs show whether setting flags is enough
            for layers whose ``eval()`` does more; without a probe their ``eval()`` is called.
    """

    def __init__(self, model: nn.Module, eval_mode: bool, probe: Probe | None) -> None:
        self.state = ModuleState(model)
        self.flags = TrainingFlags(self.state, eval_mode)
        self.hooks = RootHooks(model, self.state)
        self.probe = probe

    def load(self, load: Callable[[], Loaded]) -> Loaded:
        """Run a load function, after removing what was left of the previous checkpoint."""
        self.hooks.undo()
        self.flags.ready_to_load()
        return self.flags.load(load, self.probe)

    def in_training(self) -> None:
        """Bring layers whose ``eval()`` changes weights into the state in which they are saved."""
        self.flags.ready_to_load()


_IN_USE: weakref.WeakKeyDictionary[nn.Module, Borrowed] = weakref.WeakKeyDictionary()


@contextmanager
def borrowed(
    model: nn.Module, eval_mode: bool = True, probe: Probe | None = None
) -> Iterator[Borrowed]:
    """Use the model inside, in evaluation mode if asked, and restore it afterwards.

    It is restored after an error, too. Inside, gradients are enabled and inference mode is off, and
    other threads that need the model (or a part of it) wait.

    Restored are parameters and buffers (their values, and which objects they are), submodules,
    ``training`` and ``requires_grad`` flags, ``.grad``, the attributes of modules (lists, dicts,
    sets and objects among them also by content), hooks and the global random states. Hooks that
    the model's own forward installed are kept, with the attribute in which the model records them
    (transformers installs hooks that way when it is first called). Hooks that a load function
    installed belong to its checkpoint, as do the masks of a dropout ensemble: they are removed.

    What a forward pass leaves on modules is removed before the next one; full caches are emptied
    for the call (``caches``). ``training`` flags are set without calling ``eval()``; see
    ``training_flags``.

    Raises:
        InvalidArgumentError: for a model that was made in inference mode.
    """
    leave = torch.inference_mode(mode=False)
    with alone_with(model), same_random_states(), leave, _no_autocast_cache():
        outer = _IN_USE.get(model)
        if outer is not None:
            outer.hooks.undo()
        inside = Borrowed(model, eval_mode, probe)
        _IN_USE[model] = inside
        try:
            inside.flags.apply()
            with torch.enable_grad(), inside.hooks.attached():
                inside.flags.settle(probe)
                if probe is not None:
                    inside.hooks.undo()
                    empty_caches(inside.state, partial(inside.hooks.probed, probe))
                yield inside
        finally:
            if outer is None:
                del _IN_USE[model]
            else:
                _IN_USE[model] = outer
            inside.hooks.undo()
            inside.flags.give_back()
            inside.state.restore()


@contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """Inside, autocast does not cache weights in half precision.

    A cached weight could be that of an earlier checkpoint, or have no graph.
    """
    was = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(was)


def load_into(model: nn.Module, load: Callable[[], Loaded]) -> Loaded:
    """Run a load function; on a borrowed model, remove what the previous checkpoint left first."""
    inside = _IN_USE.get(model)
    return load() if inside is None else inside.load(load)
