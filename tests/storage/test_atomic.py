"""A file is written whole or not at all, whatever the system answers."""

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from folders import KINDS, Kind

from influence_kit.errors import InvalidArgumentError, StorageError
from influence_kit.storage import atomic
from influence_kit.storage.atomic import make_folder, remove_file, write_file
from influence_kit.storage.locks import LOCK

each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def failing(code: int) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    return fail


def test_a_file_is_replaced_and_nothing_is_left_beside(tmp_path: Path) -> None:
    write_file(tmp_path / "a", b"one")
    write_file(tmp_path / "a", b"two", memoryview(b" and three"))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"two and three"}


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "No space left on device.*free some space, or name a folder on another"),
        (errno.EDQUOT, "Disk quota exceeded.*free some space"),
        (errno.EACCES, "Permission denied.*check the folder and its permissions"),
        (errno.EROFS, "Read-only file system.*check the folder"),
    ],
)
@pytest.mark.parametrize("step", ["os.open", "os.fsync", "os.fdopen", "Path.replace"])
def test_what_the_system_refuses_names_the_file_and_leaves_the_old_one(
    step: str, code: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_file(tmp_path / "a", b"one")
    with monkeypatch.context() as patch:
        patch.setattr(f"influence_kit.storage.atomic.{step}", failing(code))
        with pytest.raises(StorageError, match=f"'{tmp_path}/a' could not be written .{words}"):
            write_file(tmp_path / "a", b"two")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"one"}


@each_kind
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_a_full_disk_and_permissions_are_clear_errors_for_every_kind(
    kind: Kind, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind.write(tmp_path / "whole", 0)
    if kind.replaces:
        kind.write(tmp_path / "new", 0)
    sync, calls = os.fsync, [0]

    def full(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] > 2:
            raise OSError(code, os.strerror(code))
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, "fsync", full)
        with pytest.raises(StorageError, match=f"'{tmp_path}/new/.*' could not be written"):
            kind.write(tmp_path / "new", 1 if kind.replaces else 0)
    assert not any(name.startswith(".") for name in kind.files(tmp_path / "new"))
    if kind.replaces:
        kind.read(tmp_path / "new", 0)
    kind.write(tmp_path / "new", 0)
    assert kind.files(tmp_path / "new") == kind.files(tmp_path / "whole")


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_file_system_that_cannot_sync_folders_is_enough(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        sync(descriptor)

    monkeypatch.setattr(atomic.os, "fsync", fsync)
    if code == errno.EIO:
        with pytest.raises(StorageError, match=r"could not be brought to the disk .Input/output e"):
            write_file(tmp_path / "a", b"one")
    else:
        write_file(tmp_path / "a", b"one")
    assert (tmp_path / "a").read_bytes() == b"one"


@each_kind
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o007])
def test_modes_follow_the_umask(kind: Kind, mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        kind.write(tmp_path / "new", 0)
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "new" / kind.holds).iterdir()}
    assert modes == {0o666 & ~mask}


@each_kind
def test_files_and_their_folder_reach_the_disk_before_the_manifest(
    kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each file: its contents, its name, and its folder, in that order."""
    events: list[str] = []
    sync, replace = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        events.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        sync(descriptor)

    def renamed(path: Path, target: Path) -> Path:
        events.append("rename")
        return replace(path, target)

    monkeypatch.setattr(atomic.os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", renamed)
    kind.write(tmp_path, 0)
    assert events == ["file", "rename", "folder"] * (len(events) // 3)
    assert len(events) >= 3 * len(kind.files(tmp_path))


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_leaves_nothing_beside(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise error

    monkeypatch.setattr(atomic.os, "fsync", interrupt)
    with pytest.raises(error):
        write_file(tmp_path / "a", b"one")
    assert list(tmp_path.iterdir()) == []


def test_what_was_swept_away_by_another_builder_is_no_error_if_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swept(path: Path, target: Path) -> None:
        raise FileNotFoundError(errno.ENOENT, "gone")

    monkeypatch.setattr(Path, "replace", swept)
    with pytest.raises(StorageError, match=r"could not be written .gone"):
        write_file(tmp_path / "a", b"one")
    (tmp_path / "a").write_bytes(b"one")
    write_file(tmp_path / "a", b"one")


def test_a_folder_that_cannot_be_made_or_emptied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InvalidArgumentError, match=r"file' is a file; name a folder"):
        make_folder(tmp_path / "file")
    with pytest.raises(StorageError, match=r"sub' could not be made .Not a directory"):
        make_folder(tmp_path / "file" / "sub")
    monkeypatch.setattr(Path, "unlink", failing(errno.EPERM))
    with pytest.raises(StorageError, match=r"file' could not be removed .Operation not permit"):
        remove_file(tmp_path / "file")


@each_kind
def test_every_kind_names_the_folder_that_cannot_be_made(kind: Kind, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises((StorageError, InvalidArgumentError), match=r"'.*file.*' (could n|is a f)"):
        kind.write(tmp_path / "file" / "sub", 0)
    if kind.holds == ".":
        with pytest.raises(InvalidArgumentError, match=r"'.*' is a file; (name|pass) a folder"):
            kind.write(tmp_path / "file", 0)


def test_a_lock_that_cannot_be_made_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("influence_kit.storage.locks.os.open", failing(errno.EACCES))
    with pytest.raises(StorageError, match=f"{LOCK}' could not be made .Permission denied"):
        KINDS["fit"].write(tmp_path, 0)
