"""One writer at a time in a folder, among processes and threads.

The system releases the lock when its process ends, however that happens, so a killed build never
blocks the next one. A lock file that a killed process left behind has no effect.
"""

import errno
import os
import socket
import stat
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from influence_kit.core.distributed import from_first_rank, is_first_rank
from influence_kit.errors import InvalidArgumentError, StorageError
from influence_kit.storage.atomic import make_folder
from influence_kit.storage.given_files import opened

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

LOCK = ".influence_kit.lock"
FLAGS = os.O_RDWR | os.O_CREAT
# do not follow links, nor block on a FIFO
for _name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC"):
    FLAGS |= getattr(os, _name, 0)
# seconds between two attempts, and of waiting before a warning
PAUSE, SILENCE = 0.02, 1.0
_BUSY = {errno.EAGAIN, errno.EACCES, errno.EDEADLK}
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}


class FolderLock:
    """The lock of a folder, which is created if it does not exist.

    Args:
        folder: the folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._path = folder, folder / LOCK
        self._descriptor: int | None = None
        self._is_taken = False

    def acquire(self) -> bool:
        """Take the lock if it is free; returns whether it was taken.

        Raises:
            StorageError: if the lock file cannot be created.
        """
        make_folder(self._folder)
        try:
            self._descriptor = os.open(self._path, FLAGS, 0o666)
        except OSError as error:
            raise self._refused("made", error) from error
        try:
            if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
                raise self._refused("locked", OSError(errno.EINVAL, "it is not an ordinary file"))
            self._is_taken = self._lock(self._descriptor) and self._is_named(self._descriptor)
            if self._is_taken:
                holder = f"process {os.getpid()} on {socket.gethostname()}"
                os.ftruncate(self._descriptor, 0)
                with suppress(OSError):  # a full disk is reported by the writer
                    os.write(self._descriptor, holder.encode())
        finally:
            if not self._is_taken:
                self.release()
        return self._is_taken

    def release(self) -> None:
        """Release the lock, and remove its file."""
        descriptor, taken = self._descriptor, self._is_taken
        self._descriptor, self._is_taken = None, False
        if descriptor is None:
            return
        # the name first: a process that waits for this file then finds no name, and takes the next
        if taken and sys.platform != "win32":
            self._path.unlink(missing_ok=True)
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)

    @property
    def holder(self) -> str:
        """The holder of the lock, as far as it is known."""
        try:
            with opened(self._path) as file:
                return file.read(200).decode(errors="replace") or "another process"
        except (OSError, InvalidArgumentError):
            return "another process"

    def _lock(self, descriptor: int) -> bool:
        try:
            if sys.platform == "win32":
                msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            else:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _BUSY:
                return False
            if error.errno not in _NO_LOCKS:
                raise self._refused("locked", error) from error
            warnings.warn(
                f"the file system of {self._folder} has no locks ({error.strerror}): see to it "
                "that one process at a time writes there",
                stacklevel=6,
            )
        return True

    def _refused(self, done: str, error: OSError) -> StorageError:
        return StorageError(
            error.errno or errno.EIO,
            f"'{self._path}' could not be {done} ({error.strerror}): check the folder and its "
            "permissions, or name another one",
        )

    def _is_named(self, descriptor: int) -> bool:
        """Whether the name still belongs to this file: the previous holder may have removed it."""
        try:
            there = os.stat(self._path)
        except FileNotFoundError:
            return False
        own = os.fstat(descriptor)
        return (there.st_dev, there.st_ino) == (own.st_dev, own.st_ino)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Inside, no other process or thread that uses this function writes to the folder.

    Waits for the current holder, with a warning after a second.
    """
    with _held(folder, lambda taken: taken):
        yield


@contextmanager
def ranks_alone_in(folder: Path, device: torch.device) -> Iterator[None]:
    """The same for all ranks of a run together: the first rank takes the lock for them.

    Every rank must call it. While they wait, the first rank reports each attempt to the others, so
    that no collective operation waits for long.

    Args:
        folder: the folder.
        device: the device of the tensors of collective operations.
    """

    def agreed(taken: bool) -> bool:
        return bool(from_first_rank(torch.tensor(float(taken), device=device)))

    with _held(folder, agreed, is_first_rank()):
        yield


@contextmanager
def _held(folder: Path, agreed: Callable[[bool], bool], takes: bool = True) -> Iterator[None]:
    """Inside, the lock is held; ``agreed`` gets the result of each attempt, and returns it."""
    lock, since, told = FolderLock(folder), time.monotonic(), False
    try:
        while not agreed(takes and lock.acquire()):
            if takes and not told and time.monotonic() - since > SILENCE:
                told = True
                warnings.warn(
                    f"{lock.holder} is writing in {folder}: waiting until it is done", stacklevel=4
                )
            time.sleep(PAUSE)
        yield
    finally:
        lock.release()


def is_locked(folder: Path) -> bool:
    """Whether another process or thread is writing to a folder now; creates no file."""
    if not (folder / LOCK).is_file():
        return False
    lock = FolderLock(folder)
    try:
        return not lock.acquire()
    except StorageError:  # a read-only folder
        return False
    finally:
        lock.release()
