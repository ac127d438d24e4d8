"""Reads saved checkpoints: weights, step, learning rate, and where the learning rate was found.

Formats: ``.pt``, ``.pth``, ``.ckpt`` and ``.bin`` files (a state dict, or a dict with one under
``model_state_dict``, ``state_dict`` or ``model``), ``.safetensors`` files, the ``checkpoint-N``
folders of Hugging Face's ``Trainer`` and the folders of accelerate's ``save_state``. Only tensors
and plain values are unpickled.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from influence_kit.core.arguments import is_finite_number, shown
from influence_kit.errors import InvalidArgumentError
from influence_kit.learning_rates.accelerate_folder import accelerate_rate
from influence_kit.learning_rates.combined_file import wrapped_rate
from influence_kit.learning_rates.rate import NO_RATE, RATE_KEYS, Rate, stored_rate
from influence_kit.learning_rates.trainer_folder import trainer_rate, trainer_state
from influence_kit.preservation.dropout_masks import MASKS
from influence_kit.storage.given_files import check_regular, read_json
from influence_kit.storage.tensor_files import UnreadableFileError, check_if_own
from influence_kit.storage.torch_files import damaged, load_file

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
SUFFIXES = (*TORCH_SUFFIXES, ".safetensors")
WEIGHT_KEYS = ("model_state_dict", "state_dict", "model")
STEP_KEYS = ("global_step", "step", "epoch")
# the weights of a folder, best first; an index lists the files of a sharded model
FOLDER_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Contents:
    """The contents of a checkpoint."""

    weights: Mapping[str, Any]
    step: int | None = None
    rate: Rate = NO_RATE
    is_adapter: bool = False
    masks: Mapping[str, Any] | None = None


def is_trainer_folder(path: Path) -> bool:
    """Whether a folder is one checkpoint (rather than a folder of checkpoints)."""
    return any((path / name).is_file() for name in (*FOLDER_WEIGHTS, ADAPTER_WEIGHTS))


def is_readable(path: Path) -> bool:
    """Whether ``read`` can read this kind of file."""
    return is_trainer_folder(path) if path.is_dir() else path.suffix in SUFFIXES


def read(checkpoint: Any) -> Contents:
    """Read a checkpoint from a path, or from a dict in memory.

    Raises:
        InvalidArgumentError: for a file of another kind, or one that holds other Python objects.
    """
    if isinstance(checkpoint, Mapping):
        return _unwrap(checkpoint)
    if not isinstance(checkpoint, str | Path):
        raise InvalidArgumentError(
            f"a checkpoint must be a path or a state dict; got a {type(checkpoint).__name__}: pass "
            "a `checkpoints_load_func(model, checkpoint)` that loads it and returns its learning "
            "rate"
        )
    path = Path(checkpoint)
    if not os.path.lexists(path):
        raise InvalidArgumentError(f"there is no checkpoint '{path}'")
    contents = _read_folder(path) if path.is_dir() else _read_file(path)
    if contents.step is None:
        numbers = re.findall(r"\d+", path.stem)
        contents = replace(contents, step=int(numbers[-1]) if numbers else None)
    return contents


def _read_file(path: Path) -> Contents:
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in TORCH_SUFFIXES:
        return _unwrap(load_file(path), path)
    raise InvalidArgumentError(
        f"'{path}' is not a checkpoint that can be read: its ending is not one of "
        f"{', '.join(SUFFIXES)}; pass a `checkpoints_load_func` for your own file formats"
    )


def _read_safetensors(path: Path) -> Contents:
    try:
        with safe_open(check_regular(path), framework="pt", device="cpu") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
            metadata = file.metadata() or {}
        check_if_own(path, weights)
    except (SafetensorError, UnreadableFileError) as error:
        raise damaged(path, error) from error
    rate = stored_rate({k: _number(metadata[k]) for k in RATE_KEYS if k in metadata})
    steps = [_step(key, _number(metadata[key])) for key in STEP_KEYS if key in metadata]
    return Contents(weights, steps[0] if steps else None, rate or NO_RATE)


def _step(key: str, value: float | str) -> int:
    """The step or epoch at which a checkpoint was saved."""
    if isinstance(value, str) or not is_finite_number(value):
        raise InvalidArgumentError(
            f"a checkpoint's '{key}' is {shown(value)}; it must be a finite number, or be left out"
        )
    return int(value)


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _read_folder(path: Path) -> Contents:
    present = [name for name in FOLDER_WEIGHTS if (path / name).is_file()]
    weights: dict[str, Any] = {}
    if not present and not (path / ADAPTER_WEIGHTS).is_file():
        raise InvalidArgumentError(
            f"the folder '{path}' is not a checkpoint: it holds none of "
            f"{', '.join((*FOLDER_WEIGHTS, ADAPTER_WEIGHTS))}"
        )
    if not present:
        files = [ADAPTER_WEIGHTS]
    elif present[0].endswith(".json"):
        files = _shards(path / present[0])
    else:
        files = present[:1]
    for name in files:
        weights.update(_read_part(path / name).weights)
    state = trainer_state(path)
    rate = accelerate_rate(path) if state is None else trainer_rate(path, state)
    step = None if state is None else state.get("global_step")
    return Contents(weights, step, rate, is_adapter=not present)


def _shards(path: Path) -> list[str]:
    """The files that an index lists, which must be in its own folder."""
    index = read_json(path)
    listed = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(listed, dict) or not listed:
        raise InvalidArgumentError(
            f"the index '{path}' holds no 'weight_map'; it must be a dict of the names of weights "
            "and of the files that hold them: copy it again"
        )
    others = [name for name in listed.values() if not isinstance(name, str)]
    names = others[:1] or sorted(set(listed.values()))
    there = sum(1 for _ in path.parent.iterdir())
    for name in names[: there + 1]:
        beside = isinstance(name, str) and name.strip(".") and Path(name).name == name
        if not beside or re.search(r"[\\/:\0]", name):
            raise InvalidArgumentError(
                f"the index '{path}' names the file {shown(name)}, which is not read: the files of "
                "an index must lie beside it, and be named without a folder; correct the index, or "
                "remove it"
            )
    if len(names) > there:  # also of millions, which would take minutes to look for
        raise InvalidArgumentError(
            f"the index '{path}' names {len(names)} files, and there are {there} in its folder; "
            "copy the missing ones"
        )
    return names


def _read_part(path: Path) -> Contents:
    """Read one of the files of a folder."""
    if not os.path.lexists(path):
        raise InvalidArgumentError(f"there is no checkpoint '{path}'")
    return _read_file(path)


def _unwrap(saved: Any, path: Path | None = None) -> Contents:
    """Weights and learning rate from a state dict, or from a dict that holds one."""
    if not isinstance(saved, Mapping):
        raise InvalidArgumentError(
            f"a checkpoint holds a {type(saved).__name__}; expected a state dict, or a dict with "
            f"one under {', '.join(WEIGHT_KEYS)}"
        )
    wrapped = [key for key in WEIGHT_KEYS if isinstance(saved.get(key), Mapping)]
    extra = (*RATE_KEYS, *STEP_KEYS)
    # among the weights, an array with one of these names is a weight
    around = (
        saved if wrapped else {k: v for k, v in saved.items() if k in extra and not _is_array(v)}
    )
    weights = saved[wrapped[0]] if wrapped else {k: v for k, v in saved.items() if k not in around}
    rate = stored_rate(around)
    if rate is None and wrapped:
        rate = wrapped_rate(saved, path)
    steps = [_step(k, saved[k]) for k in STEP_KEYS if isinstance(saved.get(k), int | float)]
    return Contents(weights, steps[0] if steps else None, rate or NO_RATE, masks=saved.get(MASKS))


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0
