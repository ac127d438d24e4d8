"""The optimizers whose state checkpoints hold: the argument, and a fingerprint of the states."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from influence_kit.checkpoints.adam_moments import optimizers_of
from influence_kit.checkpoints.discovery import label_of
from influence_kit.core.arguments import shown
from influence_kit.core.objects import is_one_of
from influence_kit.errors import InvalidArgumentError
from influence_kit.methods.data_fingerprint import data_fingerprint

Optimizer = Literal["adam"]
# files of optimizers in the folders of Hugging Face's Trainer and of accelerate
FILES = "optimizer*"


def check_optimizer(optimizer: Any, parameter_names: Any, known: Sequence[str] = ("adam",)) -> Any:
    """The argument ``optimizer``, one of those known or None.

    Raises:
        InvalidArgumentError: for anything else; for names of parameters without an optimizer.
    """
    if not is_one_of(optimizer, (*known, None)):
        names = ", ".join(f'"{name}"' for name in known)
        raise InvalidArgumentError(f"`optimizer` must be {names} or None; got {shown(optimizer)}")
    if optimizer is None and parameter_names is not None:
        raise InvalidArgumentError(
            "`parameter_names` are those of the optimizer's parameters, and `optimizer` is None; "
            "pass it, too, or leave them out"
        )
    return optimizer


def optimizer_fingerprint(checkpoints: Sequence[Any]) -> dict[str, Any]:
    """The parts of a cheap fingerprint by name; some differ if an optimizer's state has changed.

    Of states in memory it covers what ``data_fingerprint`` does; of files size and time.
    """
    found: dict[str, Any] = {}
    for number, item in enumerate(checkpoints):
        name = f"the optimizer of checkpoint {number} ({label_of(item)})"
        if isinstance(item, Mapping):
            parts = data_fingerprint(list(optimizers_of(item)))
            found |= {f"{name}: {key}": value for key, value in parts.items()}
        elif isinstance(item, str | Path):
            path = Path(item)
            files = sorted(path.glob(FILES)) if path.is_dir() else [path]
            stats = [(file.name, file.stat()) for file in files if file.exists()]
            found[name] = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return found
