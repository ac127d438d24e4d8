"""Reading files of ``torch.save``: nothing is unpickled but tensors and plain values."""

import json
import pickle
import re
from pathlib import Path
from typing import Any

import torch

from influence_kit.errors import InvalidArgumentError


def load_file(path: Path) -> Any:
    """Read a file.

    Raises:
        InvalidArgumentError: where it is damaged, or holds other Python objects.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch raise anything
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused is None or not isinstance(error, pickle.UnpicklingError):
            raise damaged(path, error) from error
        raise InvalidArgumentError(
            f"'{path}' holds a {refused[1]} beside tensors and is not unpickled unasked; save a "
            "state dict, trust that class with torch.serialization.add_safe_globals, or pass a "
            "`checkpoints_load_func`"
        ) from error


def damaged(path: Path, error: Exception) -> InvalidArgumentError:
    """The error about a file that cannot be read."""
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return InvalidArgumentError(f"'{path}' cannot be read as a checkpoint: is it whole? ({reason})")


def read_json(path: Path) -> Any:
    """The contents of a JSON file.

    Raises:
        InvalidArgumentError: where it cannot be read as one.
    """
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, error) from error


def values_of(path: Path, mapped: bool = False) -> dict[str, Any]:
    """The dict in a file, its tensors left on disk; empty for a file that cannot be read.

    Files of old versions of torch cannot be left on disk: they are read whole, unless ``mapped``.
    """
    if not path.is_file():
        return {}
    try:
        try:
            held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:
            if mapped:
                return {}
            held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # whatever is wrong with a file beside the weights, they can be read
        return {}
    return held if isinstance(held, dict) else {}
