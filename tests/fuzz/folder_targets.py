"""Folders and files of checkpoints, of which one value is another than trainers write."""

import json
import math
import pickle
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file

import influence_kit as ik
from fuzz.bad_input import Target
from fuzz.bad_values import BAD
from fuzz.method_targets import is_, network

# in place of a value: nothing is changed
KEPT = object()


def _optimizer() -> Any:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    return optimizer.state_dict(), scheduler.state_dict()


def _trainer_state() -> dict[str, Any]:
    logs = [{"step": step, "learning_rate": 0.1 / step, "loss": 1.0} for step in (1, 2, 3)]
    return {"global_step": 3, "max_steps": 9, "epoch": 1.0, "log_history": logs}


def _with(held: Any, path: str, value: Any) -> Any:
    """Nested dicts and lists with the value at a path of keys; ``""`` for the whole."""
    if not path:
        return value
    key, _, rest = path.partition("/")
    if isinstance(held, list):
        index = int(key)
        return [*held[:index], _with(held[index], rest, value), *held[index + 1 :]]
    return {**held, key: _with(held.get(key), rest, value)}


def _plain(value: Any) -> Any:
    """A value as JSON can hold it; its text where it cannot."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return repr(value)
    except RecursionError:
        return "nested"
    return value


def _saveable(value: Any) -> Any:
    """A value as a file can hold it; its text where it cannot."""
    try:
        pickle.dumps(value)
    except (TypeError, AttributeError, pickle.PicklingError):
        return repr(value)
    except RecursionError:
        return "nested"
    return value


def trainer_folder(folder: Path, file: str, path: str, value: Any) -> None:
    """A Trainer's checkpoint in a folder, with one value changed."""
    folder.mkdir()
    weights = network(1).state_dict()
    optimizer, scheduler = _optimizer()
    index = {"weight_map": dict.fromkeys(weights, "model-1.safetensors")}
    held = {
        "trainer_state.json": _trainer_state(),
        "config.json": {"transformers_version": "4.40.0"},
        "model.safetensors.index.json": index,
        "optimizer.pt": optimizer,
        "scheduler.pt": scheduler,
    }
    if value is not KEPT:
        held[file] = _with(held[file], path, value)
    save_file(weights, folder / "model-1.safetensors")
    for name, content in held.items():
        if name.endswith(".json"):
            (folder / name).write_text(json.dumps(_plain(content), skipkeys=True))
        else:
            torch.save(_saveable(content), folder / name)


# what is changed: paths of keys in each file; "" is the whole of it
PLACES = {
    "trainer_state.json": (
        "",
        "global_step",
        "max_steps",
        "epoch",
        "log_history",
        "log_history/1",
        "log_history/1/step",
        "log_history/2/learning_rate",
    ),
    "config.json": ("", "transformers_version"),
    "model.safetensors.index.json": ("", "weight_map", "weight_map/0.weight"),
    "optimizer.pt": ("", "param_groups", "param_groups/0", "param_groups/0/lr", "state"),
    "scheduler.pt": ("", "_last_lr", "base_lrs", "last_epoch", "gamma", "step_size"),
}


def loaded(folder: Path) -> float:
    rate = ik.load_checkpoint(network(), folder)
    assert math.isfinite(rate)
    return rate


def listed(folder: Path) -> str:
    return str(ik.checkpoint_table([folder]))


def selected(folder: Path) -> list[Path]:
    return ik.select_checkpoints([folder, folder], 1)


def _of_folders() -> list[Target]:
    def call(read: Any, file: str, path: str, value: Any) -> Any:
        with TemporaryDirectory() as parent:
            folder = Path(parent, "checkpoint-3")
            trainer_folder(folder, file, path, value)
            return read(folder)

    # a value that is read as another step or rate is not known to be wrong
    return [
        Target(
            f"{read.__name__}: {file}: {path}",
            partial(call, read, file, path),
            {"value": is_(KEPT)},
            {"value": set(BAD)},
        )
        for read in (loaded, listed, selected)
        for file, paths in PLACES.items()
        for path in paths
    ]


def _of_dicts() -> list[Target]:
    """Checkpoints of a user's loop, whose rate is in the state of the optimizer."""
    optimizer, scheduler = _optimizer()
    held = {
        "model_state_dict": network(1).state_dict(),
        "optimizer": optimizer,
        "scheduler": scheduler,
        "epoch": 3,
    }
    paths = [f"optimizer/{path}" for path in PLACES["optimizer.pt"] if path]
    paths += [f"scheduler/{path}" for path in PLACES["scheduler.pt"] if path]
    masks = ik.dropout_ensemble(network(), 1)[0]
    own = [f"dropout_masks/{path}" for path in ("", "seed", "member", "rates", "rates/1", "axes")]

    def call(held: Any, path: str, value: Any) -> Any:
        given = held if value is KEPT else _with(held, path.rstrip("/"), value)
        rate = ik.load_checkpoint(network(), given)
        assert math.isfinite(rate)
        return rate

    return [
        Target(f"dict: {path}", partial(call, of, path), {"value": is_(KEPT)}, {"value": set(BAD)})
        for of, places in ((held, paths), (masks, own))
        for path in places
    ]


TARGETS = [*_of_folders(), *_of_dicts()]
