"""Ensures that a load function changes only the weights of a model, not its objects."""

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from influence_kit.errors import InvalidArgumentError
from influence_kit.preservation.interrupts import uninterrupted

PARTS = {"modules": "_modules", "parameters": "_parameters", "buffers": "_buffers"}


class SameObjects:
    """A context around a load function: modules, parameters and buffers stay the same objects.

    If a parameter or buffer was replaced by another tensor, the values are copied into the model's
    own, so that later loads do not write into the user's tensors. If they cannot be copied, the
    model is restored and an error is raised. A buffer may have another shape than before.

    Args:
        model: the model.
        number: the index of the checkpoint that is loaded, for the error.

    Raises:
        InvalidArgumentError: for modules that were replaced, added or removed, for parameters or
            buffers that were added or removed, and for parameters of another shape or kind.
    """

    def __init__(self, model: nn.Module, number: int) -> None:
        self._number = number
        self._names: dict[nn.Module, str] = {m: name for name, m in model.named_modules()}
        self._tables = [
            (module, kind, table, dict(table))
            for module in self._names
            for kind, attribute in PARTS.items()
            for table in (getattr(module, attribute),)
        ]
        self._data = {
            id(item): item.data
            for *_, items in self._tables
            for item in items.values()
            if isinstance(item, Tensor)
        }

    def __enter__(self) -> None:
        return

    @uninterrupted
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        changed = [text for entry in self._tables for text in self._put_back(*entry)]
        if changed and error is None:
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise InvalidArgumentError(
                f"`checkpoints_load_func` changed the structure of the model at checkpoint "
                f"{self._number}: it {', '.join(changed[:3])}{more}. Let it load weights into the "
                "existing modules (`load_state_dict`), and change the model before you pass it to "
                "the method"
            )

    def _put_back(
        self, module: nn.Module, kind: str, table: dict[str, Any], before: dict[str, Any]
    ) -> list[str]:
        """Restore the objects of one module; returns the changes that are refused, in words."""
        found, prefix = [], f"{self._names[module]}." if self._names[module] else ""
        loaded, after = dict(table), dict(before)
        for name in {**before, **loaded}:
            old, new = before.get(name), loaded.get(name)
            what = f"{kind.removesuffix('s')} '{prefix}{name}'"
            if kind == "buffers" and name in before and name in loaded:
                after[name] = self._buffer(old, new)
            elif (old is None) != (new is None) or (name in before) != (name in loaded):
                found.append(f"{'removed' if new is None else 'added'} the {what}")
            elif isinstance(old, Tensor) and isinstance(new, Tensor):
                values = new.detach()
                if not self._copied(old, values):
                    found.append(
                        f"replaced '{prefix}{name}', which is {old.dtype} of shape "
                        f"{list(old.shape)}, by a {values.dtype} parameter of shape "
                        f"{list(values.shape)}"
                    )
            elif new is not old:
                found.append(f"replaced the {what}")
        if found or any(loaded.get(name) is not item for name, item in after.items()):
            table.clear()
            table.update(after)
        return found

    def _buffer(self, own: Tensor | None, loaded: Tensor | None) -> Tensor | None:
        """The buffer to use from now on: the model's own, or a copy if the shape has changed."""
        if own is None or loaded is None:
            return loaded
        values = loaded.detach()
        return own if self._copied(own, values) else values.clone()

    def _copied(self, own: Tensor, values: Tensor) -> bool:
        """Copy loaded values into the model's own tensor and memory; returns whether they fit."""
        data = self._data[id(own)]
        if is_lazy(own) or _memory(values) == _memory(data):
            return True
        own.data = data
        # a copy would broadcast, or drop the imaginary part
        if values.shape != data.shape or values.is_complex() != data.is_complex():
            return False
        with torch.no_grad():
            own.copy_(values)
        return True


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    """The address and layout of a tensor's values."""
    try:
        pointer, stride = tensor.data_ptr(), tensor.stride()
    except (RuntimeError, NotImplementedError):  # a sparse tensor, say
        pointer, stride = 0, ()
    return tensor.shape, tensor.dtype, tensor.device, pointer, stride
