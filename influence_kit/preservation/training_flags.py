"""Evaluation mode without side effects: ``training`` flags are set, ``eval()`` is not called.

A layer's ``eval()`` and ``train()`` may change weights: loralib merges its adapter into the weight
and takes it out again. While it is merged, the adapter's parameters have no gradient, and a
checkpoint loaded then would be misread. So such a model is brought into training mode by its own
methods, and checkpoints are loaded there. Then only flags are set, if that gives the outputs that
the model has after its own ``eval()``. If not, ``eval()`` is called after each load, and
``train()`` before the next.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from influence_kit.preservation.module_state import ModuleState, Values, set_flags

Probe = Callable[[], Any]
Loaded = TypeVar("Loaded")
# the tolerance for rounding when a weight is merged and split again: in roundings, and the most
ROUNDINGS, MOST = 1e4, 0.05


def acts(module: nn.Module) -> bool:
    """Whether a module's ``train`` or ``eval`` does more than setting flags."""
    kind, own = type(module), vars(module)
    plain = kind.train is nn.Module.train and kind.eval is nn.Module.eval
    return not plain or "train" in own or "eval" in own


class TrainingFlags:
    """Sets the training flags of a model, also if its layers' ``eval()`` does more.

    Args:
        state: the saved state of the model.
        eval_mode: True to set all flags to False; False to keep the user's.
    """

    def __init__(self, state: ModuleState, eval_mode: bool) -> None:
        self._state = state
        self._wanted = {m: not eval_mode and flag for m, flag in state.training.items()}
        self._acting = [module for module in state.modules if acts(module)]
        # whether calling ``eval()`` or ``train()`` changes more than flags
        self._matter = False
        # the state of the model in training mode, after ``eval()`` has been called
        self._before: tuple[Values, list[Any]] | None = None
        self._own: Values | None = None

    def apply(self) -> None:
        """Set the flags, with the layers otherwise in training state."""
        if self._acting:
            self._find_out()
        set_flags(self._wanted)

    def load(self, load: Callable[[], Loaded], probe: Probe | None) -> Loaded:
        """Load a checkpoint while the layers are in training state."""
        base = Values(self._state.modules) if self._matter else None
        rate = self._state.hooks.of_load(load)
        if base is None:
            return rate
        changed = self.settle(probe)
        if changed and not self._as_own(changed):
            self.ready_to_load()
            base.restore()
            is_own, is_merged = self._loaded_merged(load, changed)
            flags = [self._state.training[module] for module in self._acting]
            as_merged = is_merged and (is_own or not any(flags))
            if not as_merged:
                base.restore()
                self._state.hooks.of_load(load)
            self.settle(probe)
            if not (is_own and is_merged) and not all(flags):
                mode, other = ("evaluation", "train") if as_merged else ("training", "eval")
                warnings.warn(
                    "layers of the model change weights in eval() (a merged adapter, say) and the "
                    f"model is in evaluation mode: the checkpoint is assumed to be saved in {mode} "
                    f"mode; one that was saved after {other}() gives other scores",
                    stacklevel=2,
                )
        return rate

    def settle(self, probe: Probe | None) -> set[int]:
        """Choose between setting flags and calling ``eval()``, by outputs of a few examples.

        Returns:
            The numbers of the parameters and buffers that the methods change.
        """
        if not self._matter:
            return set()
        by_flags = outputs_of(probe)
        self._before = Values(self._state.modules), self._state.attributes.contents()
        self._call_own(self._wanted)
        set_flags(self._wanted)
        changed = self._before[0].changed()
        if by_flags is not None and close(by_flags, outputs_of(probe)):
            self._train()
            set_flags(self._wanted)
        return changed

    def ready_to_load(self) -> None:
        """Bring layers into training state, unless they are in it."""
        if self._before is not None:
            self._train()
            set_flags(self._wanted)

    def give_back(self) -> None:
        """Bring each layer back into the state in which the user had it."""
        if self._matter:
            self.ready_to_load()
            self._call_own(self._state.training)

    def _find_out(self) -> None:
        """Bring layers into training state, and see whether only flags change."""
        start = self._state.attributes.contents()
        try:
            if not all(self._state.training[module] for module in self._acting):
                self._call_own(dict.fromkeys(self._acting, True))
            changed = self._state.values.changed()
            self._matter = bool(changed or self._state.attributes.changed_since(start))
            self._own = Values(self._state.modules)
            self._before = self._own, self._state.attributes.contents()
            self._call_own(self._wanted)
        except NotImplementedError:  # an exported model has only one mode
            self._before = None
            return
        attributes = self._state.attributes.changed_since(self._before[1])
        self._matter |= bool(self._own.changed() or attributes)
        if self._matter:
            self._train()
        self._before = None

    def _call_own(self, flags: dict[nn.Module, bool]) -> None:
        """Call ``train`` or ``eval`` of the layers, outer ones first: they call the inner ones."""
        for module in self._acting:
            module.train() if flags[module] else module.eval()

    def _train(self) -> None:
        """Return to training state: by the methods, then exactly by restoring values."""
        assert self._before is not None
        values, contents = self._before
        self._call_own(dict.fromkeys(self._acting, True))
        values.restore()
        self._state.attributes.put_back(self._state.attributes.changed_since(contents))
        self._before = None

    def _as_own(self, changed: set[int]) -> bool:
        """Whether the weights that the methods change are the user's: frozen under an adapter."""
        assert self._own is not None
        now = self._own.tensors if self._before is None else self._before[0].copies
        return all(close([now[i]], [self._own.copies[i]]) for i in changed)

    def _loaded_merged(self, load: Callable[[], Any], changed: set[int]) -> tuple[bool, bool]:
        """Load a checkpoint as if it was saved after ``eval()``.

        Returns:
            Whether the weights are the user's after ``train()``, and whether they are those of the
            checkpoint again after another ``eval()``: in ``train()`` a layer may restore a copy of
            its own, whatever was loaded.
        """
        self._call_own(dict.fromkeys(self._acting, False))
        self._state.hooks.of_load(load)
        merged = Values(self._state.modules)
        self._call_own(dict.fromkeys(self._acting, True))
        is_own = self._as_own(changed)
        self._before = Values(self._state.modules), self._state.attributes.contents()
        self._call_own(dict.fromkeys(self._acting, False))
        is_merged = all(close([merged.tensors[i]], [merged.copies[i]]) for i in changed)
        self.ready_to_load()
        return is_own, is_merged


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode; its weights, flags and attributes are restored.

    ``eval`` and ``train`` are only called on layers in which they do more than set flags.
    """
    flags = {module: module.training for module in model.modules()}
    if not any(flags.values()):
        yield
        return
    if not any(map(acts, flags)):
        try:
            set_flags(dict.fromkeys(flags, False))
            yield
        finally:
            set_flags(flags)
        return
    state = ModuleState(model)
    flags_of_layers = TrainingFlags(state, eval_mode=True)
    try:
        flags_of_layers.apply()
        flags_of_layers.settle(None)
        yield
    finally:
        flags_of_layers.give_back()
        state.restore()


def outputs_of(probe: Probe | None) -> list[Tensor] | None:
    """The floating-point tensors of the outputs; None if the model fails or there is no probe."""
    if probe is None:
        return None
    try:
        with torch.no_grad(), torch.random.fork_rng():
            found: list[Tensor] = []
            _collect(probe(), found)
            return found
    except Exception:  # the model may need something that only ``eval()`` prepares
        return None


def _collect(item: Any, found: list[Tensor]) -> None:
    if isinstance(item, Tensor):
        if item.is_floating_point() or item.is_complex():
            found.append(item.detach())
    elif isinstance(item, dict):
        _collect(list(item.values()), found)
    elif isinstance(item, list | tuple):
        for value in item:
            _collect(value, found)
    elif hasattr(item, "__dict__"):  # an object of a user's class
        _collect(list(vars(item).values()), found)


def close(ones: list[Tensor], others: list[Tensor] | None) -> bool:
    """Whether there are tensors, and they are equal up to rounding."""
    if others is None or len(ones) != len(others) or not ones:
        return False
    return all(map(_pair_close, ones, others))


def _pair_close(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not (one.is_floating_point() or one.is_complex()):
        return torch.equal(one, other)
    most = min(ROUNDINGS * torch.finfo(one.dtype).eps, MOST) * other.norm()
    return torch.equal(one, other) or bool((one - other).norm() <= most)
