"""Writing a file so that there is all of it, or what was there before.

A file is written beside its final name, under a temporary name that no other program uses, brought
to the disk, and renamed last. The folder is brought to the disk after it, so that the name survives
a power cut as well. Permissions follow the umask, as those of files that a program opens itself.
"""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from uuid import uuid4

from influence_kit.errors import InvalidArgumentError, StorageError

TEMPORARY = re.compile(r"\.influence_kit-[0-9a-f]{32}\.part")
# what file systems answer that cannot bring a folder to the disk
NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}


def write_file(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file all at once; a file or link of that name is replaced.

    Several processes may write the same file: each has a temporary file of its own.

    Raises:
        StorageError: where the system does not let it be written; it names the file.
    """
    temporary = path.with_name(f".influence_kit-{uuid4().hex}.part")
    with _clear_errors(path, "written", "; what was there before is unchanged"):
        try:
            with _new_file(temporary) as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            try:
                temporary.replace(path)
            except FileNotFoundError:
                # another builder was done, and swept away what it took for that of a killed one
                if not path.exists():
                    raise
        finally:
            temporary.unlink(missing_ok=True)
    with _clear_errors(path, "brought to the disk"):
        sync_folder(path.parent)


def remove_file(path: Path) -> None:
    """Remove a file, if it is there.

    Raises:
        StorageError: where the system does not let it be removed.
    """
    with _clear_errors(path, "removed"):
        path.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, where they are not there.

    Raises:
        InvalidArgumentError: where there is a file of that name.
        StorageError: where the system does not let it be made.
    """
    if folder.exists() and not folder.is_dir():
        raise InvalidArgumentError(f"'{folder}' is a file; name a folder")
    with _clear_errors(folder, "made"):
        folder.mkdir(parents=True, exist_ok=True)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where the file system can do so."""
    if os.name != "posix":  # folders cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


def is_temporary(name: str) -> bool:
    """Whether a file of that name is one that ``write_file`` has not finished."""
    return TEMPORARY.fullmatch(name) is not None


def remove_temporaries(folder: Path) -> None:
    """Remove what killed writers have left. No writer may be at work there."""
    for path in folder.iterdir():
        if is_temporary(path.name):
            remove_file(path)


def _new_file(path: Path) -> IO[bytes]:
    """A new file, opened for writing: never one that is there, nor what a link points to."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    return os.fdopen(os.open(path, flags, 0o666), "wb")


@contextmanager
def _clear_errors(path: Path, done: str, more: str = "") -> Iterator[None]:
    """Errors of the system inside name the file, and say what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = "free some space, or name a folder on another disk"
        else:
            remedy = "check the folder and its permissions, or name another one"
        reason = error.strerror or str(error)
        raise StorageError(
            error.errno or errno.EIO,
            f"'{path}' could not be {done} ({reason}): {remedy}{more}",
        ) from error
