"""Something that is not a file under a name of ours: no reader waits, no writer goes through it."""

import errno
import json
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from folders import KINDS, Kind, nothing
from torch import nn

from influence_kit import TrainingTrace, load_checkpoint
from influence_kit.errors import InvalidArgumentError, StorageError
from influence_kit.evaluation import Retraining
from influence_kit.storage.given_files import opened
from influence_kit.storage.locks import LOCK, FolderLock, alone_in
from influence_kit.storage.manifest import MANIFEST
from influence_kit.viz import Report


def make_socket(path: Path) -> None:
    before = os.getcwd()
    os.chdir(path.parent)  # the names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(before)


SPECIAL: dict[str, Callable[[Path], None]] = {
    "fifo": os.mkfifo,
    "socket": make_socket,
    "folder": Path.mkdir,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "itself": lambda path: path.symlink_to(path.name),
}
SAID = {
    "fifo": r"is a FIFO \(named pipe\), which is not opened",
    "socket": r"No such device or address|Operation not supported",
    "folder": "is a folder, which is not opened",
    "device": "is a device, which is not opened",
    "itself": "Too many levels of symbolic links",
}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
each_thing = pytest.mark.parametrize("thing", SPECIAL)


@each_thing
def test_what_is_no_file_is_not_opened(thing: str, tmp_path: Path) -> None:
    SPECIAL[thing](tmp_path / "x")
    with pytest.raises((InvalidArgumentError, OSError), match=SAID[thing]):
        opened(tmp_path / "x")


def sorts_of(kind: Kind, folder: Path) -> list[Path]:
    """One file of each sort in a folder."""
    files = sorted(path for path in (folder / kind.holds).iterdir())
    return list({path.name.split("-")[0]: path for path in files}.values())


@each_kind
@each_thing
def test_no_reader_waits_for_what_stands_in_place_of_a_file(
    kind: Kind, thing: str, tmp_path: Path
) -> None:
    kind.write(tmp_path / "x")
    for path in sorts_of(kind, tmp_path / "x"):
        contents = path.read_bytes()
        path.unlink()
        SPECIAL[thing](path)
        # a model that is no file is not finished: it is trained
        with pytest.raises((InvalidArgumentError, UserWarning, AssertionError)):
            kind.read(tmp_path / "x", 0)
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        elif os.path.lexists(path):  # activations are saved again
            path.unlink()
        path.write_bytes(contents)
    assert kind.read(tmp_path / "x", 0)


@each_thing
def test_a_lock_that_is_no_file_is_refused(thing: str, tmp_path: Path) -> None:
    SPECIAL[thing](tmp_path / LOCK)
    with pytest.raises(StorageError, match=r"\.influence_kit\.lock' could not be (made|locked)"):
        FolderLock(tmp_path).acquire()
    assert FolderLock(tmp_path).holder == "another process"
    assert not stat.S_ISREG(os.lstat(tmp_path / LOCK).st_mode)


def test_of_a_long_lock_file_the_beginning_is_read(tmp_path: Path) -> None:
    with (tmp_path / LOCK).open("wb") as file:
        file.write(b"x" * 300)
        file.truncate(2**40)
    assert FolderLock(tmp_path).holder == "x" * 200
    with alone_in(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


@each_kind
def test_a_long_file_in_place_of_the_manifest_is_not_read(kind: Kind, tmp_path: Path) -> None:
    kind.write(tmp_path / "x")
    with (tmp_path / "x" / kind.holds / MANIFEST).open("wb") as file:
        file.truncate(2**40)
    with pytest.raises((InvalidArgumentError, UserWarning), match="larger than 64 MiB"):
        kind.read(tmp_path / "x", 0)


# Paths of users.


@pytest.mark.parametrize(
    ("path", "told"),
    [("x" * 300, "File name too long"), ("a\ud800", "surrogates not allowed"), ("a\0", "null")],
)
def test_a_path_that_no_file_system_holds_is_refused(path: str, told: str) -> None:
    for call in (
        lambda: KINDS["fit"].write(path),
        lambda: KINDS["fit"].read(path, 0),
        lambda: TrainingTrace(folder=path),
        lambda: Retraining(nothing, path),
        lambda: Report("a", ["b"]).ranking(torch.ones(1)).write(path),
    ):
        with pytest.raises(InvalidArgumentError, match=rf"must be a path, .*; got .*{told}"):
            call()


def test_a_report_replaces_a_whole_file_or_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = Report("a", ["b"]).ranking(torch.ones(1))
    (tmp_path / "page").write_bytes(b"before")
    (tmp_path / "link").symlink_to("page")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(InvalidArgumentError, match=r"is a FIFO \(named pipe\)"):
        report.write(tmp_path / "fifo")
    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", refuse)
        with pytest.raises(StorageError, match=r"page' could not be written \(No space left"):
            report.write(tmp_path / "link")
    assert (tmp_path / "page").read_bytes() == b"before"
    assert report.write(tmp_path / "link") == tmp_path / "link"
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "page").read_bytes() == report.html().encode()


def refuse(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_an_index_of_more_files_than_there_are_is_refused_at_once(tmp_path: Path) -> None:
    files = {str(number): f"model-{number}.safetensors" for number in range(10**5)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    with pytest.raises(InvalidArgumentError, match="names 100000 files, and there are 1 in its"):
        load_checkpoint(nn.Linear(1, 1), tmp_path)
