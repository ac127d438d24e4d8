"""Atomic writes: a file has all of its new contents or its old ones, never a part.

A file is written in the same folder under a temporary name that no other program uses, flushed to
disk, and renamed last. The folder is flushed after it, so that the name survives a power cut, too.
Permissions follow the umask, as those of files that a program opens itself.
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
# errors of file systems that cannot flush a folder to disk
NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}


def write_file(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file all at once; a file or link of that name is replaced.

    Several processes may write the same file: each has a temporary file of its own.

    Raises:
        StorageError: if the system refuses to write it; the message names the file.
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
                # another builder finished, and removed this file as the remains of a killed one
                if not path.exists():
                    raise
        finally:
            temporary.unlink(missing_ok=True)
    with _clear_errors(path, "brought to the disk"):
        sync_folder(path.parent)


def remove_file(path: Path) -> None:
    """Remove a file if it exists.

    Raises:
        StorageError: if the system refuses to remove it.
    """
    with _clear_errors(path, "removed"):
        path.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents, unless they exist.

    Raises:
        InvalidArgumentError: if a file of that name exists.
        StorageError: if the system refuses to create it.
    """
    if folder.exists() and not folder.is_dir():
        raise InvalidArgumentError(f"'{folder}' is a file; name a folder")
    with _clear_errors(folder, "made"):
        folder.mkdir(parents=True, exist_ok=True)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to disk, if the file system supports it."""
    if os.name != "posix":  # folders cannot be opened on Windows
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
    """Whether a file of that name is an unfinished one of ``write_file``."""
    return TEMPORARY.fullmatch(name) is not None


def remove_temporaries(folder: Path) -> None:
    """Remove the temporary files of killed writers. No writer may be active in the folder."""
    for path in folder.iterdir():
        if is_temporary(path.name):
            remove_file(path)


def _new_file(path: Path) -> IO[bytes]:
    """A new file, opened for writing: never an existing one, nor the target of a link."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    return os.fdopen(os.open(path, flags, 0o666), "wb")


@contextmanager
def _clear_errors(path: Path, done: str, more: str = "") -> Iterator[None]:
    """Inside, errors of the system name the file and the remedy."""
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
