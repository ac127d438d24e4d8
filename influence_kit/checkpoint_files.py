"""What a saved checkpoint holds: weights, step, learning rate, and where the rate was found.

Read are ``.pt``, ``.pth``, ``.ckpt`` and ``.bin`` files (a state dict, or a dict with one under
``model_state_dict``, ``state_dict`` or ``model``), ``.safetensors`` files, and the ``checkpoint-N``
folders of Hugging Face's ``Trainer``. Nothing is unpickled but tensors and plain values.
"""

import json
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from influence_kit.dropout_masks import MASKS
from influence_kit.errors import InvalidArgumentError

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
SUFFIXES = (*TORCH_SUFFIXES, ".safetensors")
WEIGHT_KEYS = ("model_state_dict", "state_dict", "model")
RATE_KEYS = ("learning_rate", "lr")
STEP_KEYS = ("global_step", "step", "epoch")
OPTIMIZER_KEYS = ("optimizer_state_dict", "optimizer", "optimizer_states")
# the weights of a Trainer's folder, best first; the second names the files of a sharded model
FOLDER_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
ADAPTER_WEIGHTS = "adapter_model.safetensors"
NO_RATE = "none found: 1"


@dataclass(frozen=True)
class Contents:
    """A checkpoint read: the rate is 1 where none is stored, which ``rate_source`` says."""

    weights: Mapping[str, Any]
    step: int | None = None
    learning_rate: float = 1.0
    rate_source: str = NO_RATE
    is_adapter: bool = False
    masks: Mapping[str, Any] | None = None


def is_trainer_folder(path: Path) -> bool:
    """Whether a folder is one checkpoint (rather than a folder of checkpoints)."""
    return any((path / name).is_file() for name in (*FOLDER_WEIGHTS, ADAPTER_WEIGHTS))


def is_readable(path: Path) -> bool:
    """Whether ``read`` knows the kind of file."""
    return is_trainer_folder(path) if path.is_dir() else path.suffix in SUFFIXES


def read(checkpoint: Any) -> Contents:
    """Read a path or a dict already in memory.

    Raises:
        InvalidArgumentError: for a file of another kind, or one that holds other Python objects.
    """
    if isinstance(checkpoint, Mapping):
        return _unwrap(checkpoint)
    if not isinstance(checkpoint, str | Path):
        raise InvalidArgumentError(
            f"a checkpoint is a path or a state dict; got a {type(checkpoint).__name__}: pass a "
            "`checkpoints_load_func(model, checkpoint)` that loads it and returns its learning rate"
        )
    path = Path(checkpoint)
    if not path.exists():
        raise InvalidArgumentError(f"there is no checkpoint '{path}'")
    if path.is_dir():
        contents = _read_folder(path)
    elif path.suffix == ".safetensors":
        contents = _read_safetensors(path)
    elif path.suffix in TORCH_SUFFIXES:
        contents = _unwrap(_torch_load(path))
    else:
        raise InvalidArgumentError(
            f"'{path}' is not a checkpoint that can be read: its ending is none of "
            f"{', '.join(SUFFIXES)}; pass a `checkpoints_load_func` for files of your own"
        )
    if contents.step is None:
        numbers = re.findall(r"\d+", path.stem)
        contents = replace(contents, step=int(numbers[-1]) if numbers else None)
    return contents


def _torch_load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch raise anything
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused is None or not isinstance(error, pickle.UnpicklingError):
            raise _damaged(path, error) from error
        raise InvalidArgumentError(
            f"'{path}' holds a {refused[1]} beside tensors and is not unpickled unasked; save a "
            "state dict, trust that class with torch.serialization.add_safe_globals, or pass a "
            "`checkpoints_load_func`"
        ) from error


def _damaged(path: Path, error: Exception) -> InvalidArgumentError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return InvalidArgumentError(f"'{path}' cannot be read as a checkpoint: is it whole? ({reason})")


def _read_safetensors(path: Path) -> Contents:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise _damaged(path, error) from error
    rate, source = _stored_rate({k: float(metadata[k]) for k in RATE_KEYS if k in metadata})
    steps = [int(float(metadata[key])) for key in STEP_KEYS if key in metadata]
    return Contents(weights, steps[0] if steps else None, rate, source)


def _read_folder(path: Path) -> Contents:
    present = [name for name in FOLDER_WEIGHTS if (path / name).is_file()]
    weights: dict[str, Any] = {}
    if not present and not (path / ADAPTER_WEIGHTS).is_file():
        raise InvalidArgumentError(
            f"the folder '{path}' is no checkpoint: it holds none of "
            f"{', '.join((*FOLDER_WEIGHTS, ADAPTER_WEIGHTS))}"
        )
    if not present:
        files = [ADAPTER_WEIGHTS]
    elif present[0].endswith(".json"):
        index = json.loads((path / present[0]).read_text())
        files = sorted(set(index["weight_map"].values()))
    else:
        files = present[:1]
    for name in files:
        weights.update(read(path / name).weights)
    step, rate, source = _trainer_state(path)
    return Contents(weights, step, rate, source, is_adapter=not present)


def _trainer_state(path: Path) -> tuple[int | None, float, str]:
    """Step and applied learning rate of a Trainer's folder.

    The scheduler's and the optimizer's rate is that of the next step (0 at the end of a linear
    decay), so the log comes first.
    """
    state_file, scheduler_file = path / "trainer_state.json", path / "scheduler.pt"
    step = None
    if state_file.is_file():
        state = json.loads(state_file.read_text())
        step = state.get("global_step")
        logged = [e for e in state.get("log_history", []) if "learning_rate" in e]
        logged = [e for e in logged if step is None or e["step"] <= step]
        if logged:
            entry = max(logged, key=lambda e: e["step"])
            source = f"trainer_state.json, log of step {entry['step']}"
            return step, float(entry["learning_rate"]), source
    if scheduler_file.is_file():
        rates = _torch_load(scheduler_file).get("_last_lr", [])
        if rates:
            return step, _only(rates), "scheduler.pt: the rate of the next step"
    return step, 1.0, NO_RATE


def _unwrap(saved: Any) -> Contents:
    """Weights and rate from a state dict, or from a dict around one."""
    if not isinstance(saved, Mapping):
        raise InvalidArgumentError(
            f"a checkpoint holds a {type(saved).__name__}; expected a state dict, or a dict with "
            f"one under {', '.join(WEIGHT_KEYS)}"
        )
    wrapped = [key for key in WEIGHT_KEYS if isinstance(saved.get(key), Mapping)]
    extra = (*RATE_KEYS, *STEP_KEYS)
    plain = {k: v for k, v in saved.items() if k not in extra or _is_array(v)}
    weights = saved[wrapped[0]] if wrapped else plain
    rate, source = _stored_rate(saved)
    if source == NO_RATE and wrapped:
        rate, source = _optimizer_rate(saved)
    steps = [int(saved[key]) for key in STEP_KEYS if isinstance(saved.get(key), int | float)]
    return Contents(weights, steps[0] if steps else None, rate, source, masks=saved.get(MASKS))


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _stored_rate(saved: Mapping[str, Any]) -> tuple[float, str]:
    for key in RATE_KEYS:
        value = saved.get(key)
        if isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1):
            return float(value), f"stored as '{key}'"
        if value is not None and not isinstance(value, Tensor):
            raise InvalidArgumentError(
                f"a checkpoint's '{key}' is {value!r}; it must be the learning rate, one number"
            )
    return 1.0, NO_RATE


def _optimizer_rate(saved: Mapping[str, Any]) -> tuple[float, str]:
    for key in OPTIMIZER_KEYS:
        state = saved.get(key)
        if isinstance(state, list | tuple) and state:
            state = state[0]
        groups = state.get("param_groups", []) if isinstance(state, Mapping) else []
        rates = [float(group["lr"]) for group in groups if "lr" in group]
        if rates:
            return _only(rates), f"optimizer state '{key}': the rate of the next step"
    return 1.0, NO_RATE


def _only(rates: Sequence[float]) -> float:
    """The one rate of all groups of parameters."""
    distinct = sorted({float(rate) for rate in rates})
    if len(distinct) > 1:
        raise InvalidArgumentError(
            f"a checkpoint's optimizer state has several learning rates, {distinct}; store the one "
            "that counts as 'learning_rate', or pass a `checkpoints_load_func`"
        )
    return distinct[0]
