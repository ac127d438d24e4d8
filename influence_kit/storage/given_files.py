"""Files that users pass, and that others may have made: checked before they are opened or read.

Opening a FIFO blocks, a small file may unpack to more than the memory, and JSON may be nested more
deeply than Python can parse. Every reader of files begins here: with ``opened`` if it reads bytes
itself, with ``check_regular`` if another library takes a path.
"""

import json
import os
import stat
import zipfile
from pathlib import Path
from typing import IO, Any

from influence_kit.errors import InvalidArgumentError

KINDS = {
    stat.S_IFIFO: "a FIFO (named pipe)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}
# the most bytes that a file may unpack to: torch.save does not compress, so these are generous
MOST_TIMES, ALWAYS_BYTES = 8, 2**26
ARCHIVE = b"PK\x03\x04"
MOST_JSON_BYTES = 2**26


def check_regular(path: Path) -> Path:
    """The path, which must lead to an ordinary file; links are followed.

    Raises:
        InvalidArgumentError: if it does not exist, or is a FIFO, socket, device or folder, whose
            opening could block; for a link to itself.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InvalidArgumentError(
            f"'{path}' cannot be opened ({reason}); pass the path of a file that exists"
        ) from error
    _refuse_special(path, mode)
    return path


def opened(path: Path) -> IO[bytes]:
    """An ordinary file, opened for reading without blocking.

    Raises:
        InvalidArgumentError: for a FIFO, device or folder, also one that has just replaced a
            file.
        OSError: if the system refuses to open it.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)
    flags |= getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)
    try:
        _refuse_special(path, os.fstat(descriptor).st_mode)
    except InvalidArgumentError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def _refuse_special(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = KINDS.get(stat.S_IFMT(mode), "no ordinary file")
        raise InvalidArgumentError(
            f"'{path}' is {kind}, which is not opened; only ordinary files are read: copy its "
            "contents into one"
        )


def check_unpacked(path: Path) -> Path:
    """The path of a file, which must not unpack to far more than its own size.

    Only the directory of a zip archive is read. A file that is not an archive is not unpacked.

    Raises:
        InvalidArgumentError: for an archive that would take more than 64 MiB and 8 times its size.
    """
    if not is_archive(path):
        return path
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise InvalidArgumentError(
            f"'{path}' cannot be read as a checkpoint: is it whole? (the directory of its archive "
            f"is damaged: {error}); copy or save it again"
        ) from error
    size = path.stat().st_size
    if unpacked > max(ALWAYS_BYTES, MOST_TIMES * size):
        raise InvalidArgumentError(
            f"'{path}' has {_megabytes(size)} and would unpack to {_megabytes(unpacked)}; "
            f"torch.save does not compress, so at most {MOST_TIMES} times the size of the file (or "
            f"{_megabytes(ALWAYS_BYTES)}) is unpacked. If you trust the file, load it with "
            "torch.load and save it again with torch.save"
        )
    return path


def is_archive(path: Path) -> bool:
    """Whether torch reads a file as a zip archive: by its first bytes, unlike ``zipfile``."""
    with opened(path) as file:
        return file.read(len(ARCHIVE)) == ARCHIVE


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def read_json(path: Path) -> Any:
    """The contents of a JSON file.

    Raises:
        InvalidArgumentError: for a file that is not JSON in UTF-8, is larger than 64 MiB, or is
            nested too deeply.
    """
    size = check_regular(path).stat().st_size
    if size > MOST_JSON_BYTES:
        raise InvalidArgumentError(
            f"'{path}' has {_megabytes(size)}; JSON files of at most {_megabytes(MOST_JSON_BYTES)} "
            "are read. Remove what is not needed from it (a Trainer's 'log_history', say)"
        )
    try:
        with opened(path) as file:
            return json.load(file)
    except RecursionError as error:
        raise InvalidArgumentError(
            f"'{path}' is nested too deeply to be read; a Trainer nests its JSON files a few "
            "levels deep: write the file again"
        ) from error
    except (OSError, ValueError) as error:
        raise InvalidArgumentError(
            f"'{path}' cannot be read as JSON ({error}); copy it again, or write it again"
        ) from error
