"""Saves a model's tensors, flags and hooks when a call begins, to restore them when it ends."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from influence_kit.errors import InvalidArgumentError
from influence_kit.preservation.attributes import Attributes

HOOK_TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
PACKAGE = f"{__name__.partition('.')[0]}."
Table = dict[int, Any]
Loaded = TypeVar("Loaded")


class ModuleState:
    """Submodules, parameters, buffers, gradients, flags, attributes and hooks of a model.

    Raises:
        InvalidArgumentError: if a parameter or buffer was made in inference mode.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = list(model.modules())
        kinds = ("_modules", "_parameters", "_buffers")
        owners = [getattr(module, kind) for module in self.modules for kind in kinds]
        # those of a ScriptModule are not dicts, and cannot change
        self._members = [(owner, dict(owner)) for owner in owners if isinstance(owner, dict)]
        _refuse_inference(model)
        parameters = [p for m in self.modules for p in m._parameters.values() if p is not None]
        self.values = Values(self.modules)
        self._flags = [(p, p.requires_grad, p.grad) for p in parameters]
        self.training = {module: module.training for module in self.modules}
        self.hooks = Hooks(self.modules)
        self.attributes = Attributes(self.modules, self.values.tensors)

    def restore(self) -> None:
        """Restore the model, except for the hooks that its own forward installed."""
        for owner, members in self._members:
            now, then = [*owner, *map(id, owner.values())], [*members, *map(id, members.values())]
            if now != then:
                owner.clear()
                owner.update(members)
        self.values.restore()
        for parameter, requires_grad, gradient in self._flags:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
        set_flags(self.training)
        self.hooks.restore()
        self.attributes.restore()


def set_flags(flags: dict[nn.Module, bool]) -> None:
    """Set the ``training`` flags of modules without calling their methods."""
    for module, training in flags.items():
        module.training = training


class Values:
    """A copy of the values of the parameters and buffers of modules."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        found = [t for m in modules for t in (*m._parameters.values(), *m._buffers.values())]
        self.tensors = list({id(t): t for t in found if t is not None}.values())
        self.copies = [tensor.detach().clone() for tensor in self.tensors]

    def restore(self) -> None:
        """Restore the values."""
        with torch.no_grad():
            for tensor, copy in zip(self.tensors, self.copies, strict=True):
                # only changed values: a buffer may be an expanded tensor, which cannot be written
                if not torch.equal(tensor, copy):
                    tensor.copy_(copy)

    def changed(self) -> set[int]:
        """The numbers of the tensors whose values have changed."""
        pairs = enumerate(zip(self.tensors, self.copies, strict=True))
        return {number for number, (tensor, copy) in pairs if not torch.equal(tensor, copy)}


class Hooks:
    """The hooks of modules when a call begins, and which later ones are kept."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules
        self._tables = [getattr(module, name) for module in modules for name in HOOK_TABLES]
        self._start = self._now()
        # hooks that a load function installed, which belong to its checkpoint
        self._of_loads: list[Table] = [{} for _ in self._start]

    def _now(self) -> list[Table]:
        return [dict(table) for table in self._tables]

    def counts(self) -> list[int]:
        """The number of hooks of each kind of each module."""
        return list(map(len, self._tables))

    def grown_since(self, before: Sequence[int]) -> set[nn.Module]:
        """The modules that have more hooks than before."""
        kinds = len(HOOK_TABLES)
        return {
            self._modules[number // kinds]
            for number, (now, then) in enumerate(zip(self.counts(), before, strict=True))
            if now > then
        }

    def of_load(self, load: Callable[[], Loaded]) -> Loaded:
        """Run a load function; its hooks replace those of the previous load."""
        for table, loaded in zip(self._tables, self._of_loads, strict=True):
            for key in loaded:
                table.pop(key, None)
        before = self._now()
        try:
            return load()
        finally:
            self._of_loads = [
                {key: hook for key, hook in table.items() if key not in known}
                for table, known in zip(self._tables, before, strict=True)
            ]

    def restore(self) -> None:
        """Restore the hooks of the start; keep those that the model's forward installed since."""
        # the key of a hook is the same in the tables of its options, and in no other
        ours = {key for table in self._tables for key, hook in table.items() if _is_ours(hook)}
        for table, known, loaded in zip(self._tables, self._start, self._of_loads, strict=True):
            later = table.keys() - known.keys() - loaded.keys() - ours
            kept = {**known, **{key: table[key] for key in table if key in later}}
            if list(table) != list(kept):
                table.clear()
                table.update(kept)


def _is_ours(hook: Any) -> bool:
    """Whether a hook is of this package: one whose removal an interrupt prevented, or a mask."""
    function = getattr(hook, "func", hook)  # of a partial
    return str(getattr(function, "__module__", "")).startswith(PACKAGE)


def _refuse_inference(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_inference():
            raise InvalidArgumentError(
                f"'{name}' of the model was made inside torch.inference_mode(), whose tensors "
                "autograd cannot use: build or load the model outside of it, or pass "
                "copy.deepcopy(model), made outside"
            )
