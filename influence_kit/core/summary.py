"""A method in a few lines: its class, the arguments that differ from their defaults, and notes."""

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# arguments that the notes describe, or that are the same for all methods of a model
LEFT_OUT = {
    "model",
    "module",
    "train_dataset",
    "influence_src_dataset",
    "checkpoint",
    "checkpoints",
    "damping",
    "hessian_reg",
    "ridge",
    "replace_nan",
    "show_progress",
}
# arguments that are kept under another name
KEPT_AS = {
    "eval_mode": "_eval_mode",
    "count_bias": "_count_bias",
    "hessian_dataset": "_hessian_data",
}
# the text of an argument that was left out
FILLED_IN = {"nearest_neighbors": "ExactNearestNeighbors", "features": "FeatureMap()"}
MOST_ITEMS = 4


def summary(owner: Any, notes: Sequence[str] = ()) -> str:
    """The class with the arguments that differ from their defaults, and a line for each note.

    Args:
        owner: an object that keeps its arguments as attributes of their names.
        notes: further lines.
    """
    model = getattr(owner, "model", getattr(owner, "module", None))
    shown = []
    for name, parameter in inspect.signature(type(owner)).parameters.items():
        value = getattr(owner, KEPT_AS.get(name, name), inspect.Parameter.empty)
        if name in LEFT_OUT or value is inspect.Parameter.empty:
            continue
        text = value_text(value, model)
        usual = {value_text(parameter.default, model), FILLED_IN.get(name)}
        # tests have the training loss where none is given
        is_filled = name == "test_loss_fn" and value is getattr(owner, "loss_fn", None)
        if text not in usual and not is_filled:
            shown.append(f"{name}={text}")
    head = f"{type(owner).__name__}({', '.join(shown)})"
    return "\n  ".join([head, *notes])


def value_text(value: Any, model: Any = None) -> str:
    """An argument, short: large ones by their kind and size, functions by their names.

    Args:
        value: the argument.
        model: whose modules are shown by their names.
    """
    if value is None or isinstance(value, bool | int | str | torch.dtype):
        return f'"{value}"' if isinstance(value, str) else str(value)
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Path):
        return f'"{value}"'
    if isinstance(value, Tensor | np.ndarray):
        return f"{type(value).__name__} {list(value.shape)}"
    if isinstance(value, partial):
        return value_text(value.func, model)
    if isinstance(value, list | tuple | Mapping):
        return _items_text(value, model)
    return _object_text(value, model)


def _items_text(items: Any, model: Any) -> str:
    if len(items) > MOST_ITEMS:
        return f"{type(items).__name__} of {len(items)}"
    if isinstance(items, Mapping):
        pairs = (f"{value_text(k)}: {value_text(v, model)}" for k, v in items.items())
        return f"{{{', '.join(pairs)}}}"
    text = ", ".join(value_text(item, model) for item in items)
    return f"[{text}]" if isinstance(items, list) else f"({text})"


def _object_text(value: Any, model: Any) -> str:
    if isinstance(value, nn.Module) and isinstance(model, nn.Module):
        for name, module in model.named_modules():
            if module is value:
                return f'"{name}"'
    if getattr(type(value), "shows_settings", False):
        return repr(value)
    if isinstance(value, type) or not callable(value) or isinstance(value, nn.Module):
        kind = value if isinstance(value, type) else type(value)
        return kind.__name__
    return str(getattr(value, "__name__", type(value).__name__))


def counted(count: int, noun: str) -> str:
    """The number with its noun: "1 layer", "1,234 parameters"."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def size_notes(checkpoints: int, parameters: Mapping[str, nn.Parameter]) -> list[str]:
    """The numbers of checkpoints, parameters and layers, as one line; no line if all are 0."""
    layers = {name.rpartition(".")[0] for name in parameters}
    size = counted(sum(p.numel() for p in parameters.values()), "parameter")
    found = [counted(checkpoints, "checkpoint")] if checkpoints else []
    found += [f"{size} in {counted(len(layers), 'layer')}"] if parameters else []
    return [", ".join(found)] if found else []
