"""Uses a model and restores it afterwards: weights, flags, attributes, hooks, random states."""

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from types import FrameType, TracebackType
from typing import TypeVar

import torch
from torch import nn

from influence_kit.core.locks import alone_with
from influence_kit.core.random_states import same_random_states
from influence_kit.preservation.caches import empty_caches
from influence_kit.preservation.interrupts import INTERRUPTS, to_its_end, uninterrupted
from influence_kit.preservation.module_state import ModuleState, Values
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


class Borrowing(AbstractContextManager[Borrowed]):
    """The use of a model in a ``with`` block; see ``borrowed``.

    Not a generator: Ctrl-C between a generator's ``with`` block and its restoration would skip it.
    """

    def __init__(self, model: nn.Module, eval_mode: bool, probe: Probe | None) -> None:
        self._model, self._eval_mode, self._probe = model, eval_mode, probe
        self._exits = ExitStack()

    def __enter__(self) -> Borrowed:
        """Set the model up."""
        try:
            self._begin(sys._getframe(1))
            self._exits.enter_context(alone_with(self._model))
            self._keep_global_states()
            outer = _IN_USE.get(self._model)
            if outer is not None:
                outer.hooks.undo()
            inside = Borrowed(self._model, self._eval_mode, self._probe)
            self._use(inside, outer)
            inside.flags.settle(self._probe)
            if self._probe is not None:
                inside.hooks.undo()
                empty_caches(inside.state, partial(inside.hooks.probed, self._probe))
            return inside
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise

    @uninterrupted
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Restore the model."""
        try:
            self._exits.__exit__(kind, error, trace)
        finally:
            INTERRUPTS.leave(self)

    @uninterrupted
    def _begin(self, frame: FrameType) -> None:
        INTERRUPTS.use(self, frame)

    @uninterrupted
    def _keep_global_states(self) -> None:
        self._exits.enter_context(same_random_states())
        self._exits.enter_context(torch.inference_mode(mode=False))
        self._exits.enter_context(_no_autocast_cache())

    @uninterrupted
    def _use(self, inside: Borrowed, outer: Borrowed | None) -> None:
        """Set flags and hooks, after what will restore them: the last is undone first."""
        later = self._exits.callback
        later(to_its_end, inside.state.restore)
        later(to_its_end, inside.flags.give_back)
        later(to_its_end, inside.hooks.undo)
        _IN_USE[self._model] = inside
        later(_set_use, self._model, outer)
        inside.flags.apply()
        self._exits.enter_context(torch.enable_grad())
        self._exits.enter_context(inside.hooks.attached())


def _set_use(model: nn.Module, use: Borrowed | None) -> None:
    if use is None:
        del _IN_USE[model]
    else:
        _IN_USE[model] = use


def borrowed(model: nn.Module, eval_mode: bool = True, probe: Probe | None = None) -> Borrowing:
    """Use the model inside, in evaluation mode if asked, and restore it afterwards.

    It is restored after an error, too, and Ctrl-C does not stop the restoration: the interrupt is
    delivered at its end. Inside, gradients are enabled and inference mode is off, and other threads
    that need the model (or a part of it) wait.

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
    return Borrowing(model, eval_mode, probe)


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


@uninterrupted
def load_whole(model: nn.Module, load: Callable[[], object]) -> None:
    """Run a load function to its end, also if Ctrl-C is pressed; after an error undo it.

    Of a model in use nothing is undone here: the values of its start are restored later.
    """
    if model in _IN_USE:
        load()
        return
    values = Values(list(model.modules()))
    try:
        load()
    except BaseException:
        to_its_end(values.restore)
        raise
