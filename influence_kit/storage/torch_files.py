"""Reads files of ``torch.save``; only tensors and plain values are unpickled."""

import pickle
import re
import zipfile
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import torch

from influence_kit.errors import InvalidArgumentError
from influence_kit.storage.given_files import check_regular, check_unpacked, is_archive, opened

# the first bytes of a file that is not an archive; files of 2016, which torch unpacks, are refused
PICKLE = b"\x80"
# the only type that torch unpickles whose size is given by a number
BYTEARRAY = re.compile(rb"c(__builtin__|builtins)\nbytearray\n")


def load_file(path: Path) -> Any:
    """Read a file.

    Raises:
        InvalidArgumentError: if it is damaged, is not an ordinary file, would unpack to far more
            than its size, or holds other Python objects.
    """
    _refuse_large(check_regular(path))
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch raise anything
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused is None or not isinstance(error, pickle.UnpicklingError):
            raise damaged(path, error) from error
        raise InvalidArgumentError(
            f"'{path}' holds a {refused[1]} beside tensors and is not unpickled by default; save a "
            "state dict, trust that class with torch.serialization.add_safe_globals, or pass a "
            "`checkpoints_load_func`"
        ) from error


def _refuse_large(path: Path) -> None:
    """Refuse a file that would take far more memory than its size, before any of it is read."""
    check_unpacked(path)
    if is_archive(path):
        try:
            with zipfile.ZipFile(path) as archive:
                # entries, not names: of two with one name each may be read
                pickles = [e for e in archive.infolist() if e.filename.endswith(".pkl")]
                found = any(BYTEARRAY.search(archive.read(entry)) for entry in pickles)
        except Exception as error:  # any error of the archive: zlib, encryption, ...
            raise damaged(path, error) from error
    else:
        with opened(path) as file:
            if file.read(1) != PICKLE:
                raise damaged(path, ValueError("it does not begin as torch.save begins a file"))
            found = bool(BYTEARRAY.search(mmap(file.fileno(), 0, access=ACCESS_READ)))
    if found:
        raise InvalidArgumentError(
            f"'{path}' holds a bytearray, which may take any amount of memory and is not made from "
            "a file; save tensors and plain values, or pass a `checkpoints_load_func`"
        )


def damaged(path: Path, error: Exception) -> InvalidArgumentError:
    """The error about a file that cannot be read."""
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return InvalidArgumentError(f"'{path}' cannot be read as a checkpoint: is it whole? ({reason})")


def values_of(path: Path, mapped: bool = False) -> dict[str, Any]:
    """The dict in a file, its tensors left on disk; empty for a file that cannot be read.

    Files of old versions of torch cannot be left on disk: they are read in full, unless ``mapped``.
    """
    if not path.is_file():  # also a FIFO, whose opening would block
        return {}
    try:
        _refuse_large(path)
        try:
            held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:
            if mapped:
                return {}
            held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # the weights can be read whatever the error in a file beside them is
        return {}
    return held if isinstance(held, dict) else {}
