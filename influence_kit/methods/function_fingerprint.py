"""A fingerprint of a loss: the tensors that it computes with, and the settings of torch's losses.

It covers a module's parameters and buffers, and the tensors that a function has as defaults, in
``functools.partial``, in its closure and among the globals that it uses, each by value. A module in
the closure counts if none of its parameters is trained: otherwise it is the model. Values that are
not tensors count for torch's own losses only (``reduction``, ``ignore_index``).
"""

from collections.abc import Callable, Iterator
from functools import partial
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from influence_kit.methods.data_fingerprint import tensor_fingerprint

DEPTH = 4
SETTINGS = bool | int | float | str


def function_fingerprint(function: Callable[..., Any] | None, model: nn.Module) -> dict[str, Any]:
    """The parts of the fingerprint by name; some differ if the function uses other tensors.

    Args:
        function: the loss.
        model: the model, whose tensors do not count: a checkpoint determines them.
    """
    own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    found = _parts("it", function, DEPTH)
    return {
        name: tensor_fingerprint(item) if isinstance(item, Tensor) else item
        for name, item in found
        if id(item) not in own
    }


def _parts(name: str, item: Any, depth: int) -> Iterator[tuple[str, Any]]:
    if depth < 0:
        return
    if isinstance(item, Tensor):
        yield name, item
    elif isinstance(item, nn.Module):
        yield from _of_module(name, item, depth)
    elif isinstance(item, partial):
        yield from _parts(name, item.func, depth - 1)
        for key, value in (*enumerate(item.args), *item.keywords.items()):
            yield from _parts(f"{name}: {key}", value, depth - 1)
    elif isinstance(item, MethodType):
        if not _is_trained(item.__self__):
            yield from _parts(name, item.__self__, depth - 1)
    elif isinstance(item, FunctionType):
        for key, value in _around(item).items():
            if not _is_trained(value):
                yield from _parts(key, value, depth - 1)
    elif isinstance(item, tuple | list):
        for number, value in enumerate(item[:DEPTH]):
            yield from _parts(f"{name}[{number}]", value, depth - 1)
    elif depth == DEPTH and hasattr(item, "__dict__"):
        for key, value in vars(item).items():
            if not _is_trained(value):
                yield from _parts(f"{name}.{key}", value, depth - 1)


def _of_module(name: str, module: nn.Module, depth: int) -> Iterator[tuple[str, Any]]:
    for key, value in (*module.named_parameters(), *module.named_buffers()):
        yield f"{name}.{key}", value
    for part in module.modules():
        if type(part).__module__.startswith("torch.nn."):
            for key, value in vars(part).items():
                if isinstance(value, SETTINGS) and not key.startswith("_") and key != "training":
                    yield f"{name}.{key}", value
        else:
            for key, value in vars(part).items():
                if isinstance(value, Tensor | partial):
                    yield from _parts(f"{name}.{key}", value, depth - 1)


def _around(function: FunctionType) -> dict[str, Any]:
    """The values that a function uses beside its arguments, by name."""
    code = function.__code__
    found = {key: function.__globals__.get(key) for key in code.co_names}
    for key, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[key] = cell.cell_contents
        except ValueError:  # of a name that has no value yet
            continue
    defaults = {f"default {i}": value for i, value in enumerate(function.__defaults__ or ())}
    return {**found, **defaults, **(function.__kwdefaults__ or {})}


def _is_trained(item: Any) -> bool:
    if isinstance(item, nn.Module):
        return any(parameter.requires_grad for parameter in item.parameters())
    return isinstance(item, Tensor) and item.requires_grad
