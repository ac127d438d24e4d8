"""The weights of a checkpoint under a model's own names, checked to fit before any is copied."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from influence_kit.checkpoints.files import Contents
from influence_kit.core.arguments import shown
from influence_kit.errors import InvalidArgumentError

# what wrappers put before the names
PREFIXES = ("module.", "_orig_mod.", "model.", "net.")


def fitting(model: nn.Module, contents: Contents, label: str) -> dict[str, Any]:
    """The weights under the model's own keys, checked to fit."""
    expected = model.state_dict(keep_vars=True)
    odd = [key for key in contents.weights if not isinstance(key, str)]
    if odd:
        raise InvalidArgumentError(
            f"checkpoint {label} has the key {shown(odd[0])}; the keys of a state dict are names "
            f"of parameters, such as {shown(next(iter(expected), 'weight'))}: pass the state dict"
        )
    given = _rename(contents, set(expected))
    pointers = {v.data_ptr() for k, v in expected.items() if k in given and isinstance(v, Tensor)}
    missing = [
        key
        for key, value in expected.items()
        if key not in given
        and not (isinstance(value, Tensor) and value.numel() and value.data_ptr() in pointers)
        and not (contents.is_adapter and "lora_" not in key)
    ]
    unexpected = [key for key in given if key not in expected]
    shapes = [
        f"{key}: {list(value.shape)} where the model has {list(expected[key].shape)}"
        for key, value in given.items()
        if _is_dense(value) and key in expected and value.shape != expected[key].shape
    ]
    kinds = [
        f"{key}: {_kind(value)} where the model has {_kind(expected[key])}"
        for key, value in given.items()
        if _is_of_another_kind(value, expected.get(key))
    ]
    if missing or unexpected or shapes or kinds:
        more = f", other kinds of numbers {_shown(kinds)}" if kinds else ""
        raise InvalidArgumentError(
            f"checkpoint {label} does not fit the model: missing keys {_shown(missing)}, "
            f"unexpected keys {_shown(unexpected)}, other shapes {_shown(shapes)}{more}; "
            "pass checkpoints of this model"
        )
    return given


def _is_dense(value: Any) -> bool:
    dense = isinstance(value, Tensor) and value.layout == torch.strided
    return dense and not (value.is_nested or value.is_quantized)


def _is_of_another_kind(value: Any, into: Any) -> bool:
    """Whether a value cannot be copied into a tensor, or not without its imaginary part."""
    if not _is_dense(into):
        return isinstance(into, Tensor) and _kind(value) != _kind(into)
    if not _is_dense(value) or (value.is_meta and not into.is_meta):
        return True
    return bool(value.is_complex() != into.is_complex())


def _kind(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    if value.is_meta:
        return f"{value.dtype} without values (meta)"
    return str(value.dtype) if _is_dense(value) else f"{value.dtype} ({value.layout})"


def _shown(items: Sequence[str], most: int = 5) -> str:
    rest = f" and {len(items) - most} more" if len(items) > most else ""
    return f"{list(items[:most])}{rest}"


def _rename(contents: Contents, expected: set[str]) -> dict[str, Any]:
    """The weights, with wrappers' prefixes stripped or added if more keys fit then."""
    best = dict(contents.weights)
    if contents.is_adapter:  # the file's keys lack the adapter's name
        best = {
            key if key in expected else re.sub(r"\.(\w+)$", r".default.\1", key): value
            for key, value in best.items()
        }
    renamings, stripped = [best], best
    while prefix := next((p for p in PREFIXES if stripped and _all_start(stripped, p)), None):
        # wrappers may be nested
        stripped = {key.removeprefix(prefix): value for key, value in stripped.items()}
        renamings.append(stripped)
    renamings += [{p + key: value for key, value in best.items()} for p in PREFIXES]
    return max(renamings, key=lambda weights: len(expected & set(weights)))


def _all_start(weights: Mapping[str, Any], prefix: str) -> bool:
    return all(key.startswith(prefix) for key in weights)
