"""One writer at a time in a folder: the second waits and reads, a killed one keeps nobody out."""

import errno
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from folders import DATA, KINDS, TEST, build_store, net, store
from server_processes import context
from torch import Tensor, nn
from torch.utils.data import Dataset

from influence_kit import GradDot
from influence_kit.errors import InvalidArgumentError, StorageError
from influence_kit.gradients.store import GradientStore
from influence_kit.storage import folders as folders_module
from influence_kit.storage import locks
from influence_kit.storage.locks import LOCK, FolderLock, alone_in, is_locked, ranks_alone_in
from influence_kit.storage.manifest import Manifest


def test_a_lock_is_taken_by_one_and_leaves_no_file(tmp_path: Path) -> None:
    first, second = FolderLock(tmp_path / "new"), FolderLock(tmp_path / "new")
    assert first.acquire()
    assert f"process {os.getpid()} on" in second.holder
    assert not second.acquire()
    assert is_locked(tmp_path / "new")
    first.release()
    first.release()
    assert not is_locked(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []
    assert second.holder == "another process"
    assert second.acquire()
    second.release()


def test_threads_take_turns(tmp_path: Path) -> None:
    inside: list[int] = []

    def work(number: int) -> None:
        with alone_in(tmp_path):
            inside.append(number)
            time.sleep(0.001)
            assert inside.pop() == number
            assert not inside

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(40)))
    assert list(tmp_path.iterdir()) == []


def test_who_waits_is_told_for_whom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "SILENCE", 0.0)
    lock = FolderLock(tmp_path)
    lock.acquire()
    threading.Timer(0.2, lock.release).start()
    with (
        pytest.warns(UserWarning, match=rf"process {os.getpid()} on .* is writing in .*: waiting"),
        alone_in(tmp_path),
    ):
        pass


def test_an_interrupt_while_waiting_leaves_the_other_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = FolderLock(tmp_path)
    lock.acquire()

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(locks.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt), alone_in(tmp_path):
        pass
    assert is_locked(tmp_path)
    lock.release()


def test_the_file_of_a_killed_process_keeps_nobody_out(tmp_path: Path) -> None:
    code = (
        "import os, signal; from pathlib import Path;"
        "from influence_kit.storage.locks import FolderLock;"
        f"FolderLock(Path({str(tmp_path)!r})).acquire(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / LOCK).is_file()
    assert not is_locked(tmp_path)
    with alone_in(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EIO])
def test_a_file_system_without_locks_is_said(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("influence_kit.storage.locks.fcntl.flock", flock)
    lock = FolderLock(tmp_path)
    if code == errno.EIO:
        with pytest.raises(StorageError, match=r"lock' could not be locked .Input/output error"):
            lock.acquire()
        return
    with pytest.warns(UserWarning, match="has no locks .*: see to it that one process at a time"):
        assert lock.acquire()


def test_a_folder_that_is_only_read_counts_as_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / LOCK).write_text("")

    def refuse(*_: Any) -> int:
        raise PermissionError(errno.EACCES, "no")

    monkeypatch.setattr("influence_kit.storage.locks.os.open", refuse)
    assert not is_locked(tmp_path)


def test_ranks_hold_one_lock_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second rank takes none, and goes in when the first has it."""
    answers = iter([False, False, True])
    heard: list[bool] = []

    def from_first_rank(tensor: Tensor) -> Tensor:
        heard.append(bool(tensor))
        return torch.tensor(float(next(answers)))

    with monkeypatch.context() as patch:
        patch.setattr(locks, "is_first_rank", lambda: False)
        patch.setattr(locks, "from_first_rank", from_first_rank)
        with ranks_alone_in(tmp_path, torch.device("cpu")):
            assert heard == [False] * 3
            assert not (tmp_path / LOCK).exists()
    with ranks_alone_in(tmp_path, torch.device("cpu")):
        assert (tmp_path / LOCK).exists()


# Stores that several processes build and read.


def test_an_unfinished_store_says_that_it_is_being_built(tmp_path: Path) -> None:
    store(tmp_path)
    with alone_in(tmp_path), pytest.raises(InvalidArgumentError, match="another process is buildi"):
        GradientStore.open(tmp_path)
    with pytest.raises(InvalidArgumentError, match="12 of 12 chunks are missing, or `finish` was"):
        GradientStore.open(tmp_path)


def test_chunks_that_another_writes_meanwhile_do_no_harm(tmp_path: Path) -> None:
    """Without a lock: what is wanted is what was missing when filling began."""
    build_store(tmp_path / "whole")
    built = store(tmp_path / "twice")

    def rows(number: int) -> Tensor:
        whole: Tensor = GradientStore.open(tmp_path / "whole").read(0, number, number + 1)
        return whole

    def pieces() -> Any:
        for row in range(12):
            if built.wanted(0, row, row + 1):
                yield row, rows(row)
            if row == 4:  # in the middle of a chunk
                build_store(tmp_path / "twice")

    built.fill(0, pieces())
    built.fill(1, [])
    built.finish()
    kind = KINDS["gradients"]
    assert kind.files(tmp_path / "twice") == kind.files(tmp_path / "whole")


def test_a_manifest_that_another_makes_meanwhile_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = folders_module.foreign_file

    def late(folder: Path, kind: str) -> str | None:
        Manifest("gradients", {}, files={"a": {"size": 1, "checksum": ""}}).write(folder)
        return look(folder, kind)

    monkeypatch.setattr(folders_module, "foreign_file", late)
    assert folders_module.claim(tmp_path, "gradients") == ["a"]


class Slow(Dataset):
    """Examples that take their time, so that builds overlap."""

    def __len__(self) -> int:
        return len(DATA)

    def __getitem__(self, index: int) -> Any:
        time.sleep(0.01)
        return DATA[index]


def ask(folder: str, results: Any, rank: int | None = None, rendezvous: str = "") -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if rank is not None:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    states = [net(seed).state_dict() for seed in range(3)]
    loss = nn.CrossEntropyLoss()
    results.put(GradDot(net(), Slow(), states, loss_fn=loss, store=folder).influence(TEST).numpy())


@pytest.mark.slow
def test_two_builders_and_a_reader_get_the_same_answer(tmp_path: Path) -> None:
    results = context().Queue()
    store_folder = str(tmp_path / "store")
    processes = [context().Process(target=ask, args=(store_folder, results)) for _ in range(3)]
    answers_are_right(processes, results)
    assert not list((tmp_path / "store").glob(".*"))


@pytest.mark.slow
def test_two_runs_of_two_ranks_build_one_store(tmp_path: Path) -> None:
    """The ranks of a run hold the lock together; the other run waits, and reads."""
    results = context().Queue()
    processes = [
        context().Process(
            target=ask, args=(str(tmp_path / "store"), results, rank, str(tmp_path / f"run{run}"))
        )
        for run in range(2)
        for rank in range(2)
    ]
    answers_are_right(processes, results)
    ask(str(tmp_path / "alone"), queue.Queue())
    kind = KINDS["gradients"]
    assert kind.files(tmp_path / "store") == kind.files(tmp_path / "alone")


def answers_are_right(processes: list[Any], results: Any) -> None:
    """All processes give the scores that no store and no other process has had a part in."""
    for process in processes:
        process.start()
    found = [torch.from_numpy(results.get(timeout=60)) for _ in processes]
    for process in processes:
        process.join(60)
    states = [net(seed).state_dict() for seed in range(3)]
    expected = GradDot(net(), DATA, states, loss_fn=nn.CrossEntropyLoss()).influence(TEST)
    for one in found:
        torch.testing.assert_close(one, expected, rtol=1e-12, atol=1e-14)
