"""A fingerprint of the optimizers' states of checkpoints, cheap enough to be computed per call."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from influence_kit.checkpoints.adam_moments import optimizers_of
from influence_kit.checkpoints.discovery import label_of
from influence_kit.methods.data_fingerprint import data_fingerprint

# files of optimizers in the folders of Hugging Face's Trainer and of accelerate
FILES = "optimizer*"


def optimizer_fingerprint(checkpoints: Sequence[Any]) -> dict[str, Any]:
    """The parts of the fingerprint by name; some differ if an optimizer's state has changed.

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
