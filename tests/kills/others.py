"""Several processes at one store, flipped bits, and what the system refuses."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from folders import DATA, KINDS, TEST, Kind, net
from server_processes import context
from torch import nn

from influence_kit import GradDot
from influence_kit.errors import InvalidArgumentError, StorageError
from kills.run import Outcome, same
from kills.works import STATES

FINISHED, CLEAR, FAILED = 0, 5, 1
NOBODY = 65534


# Two builders and a reader.


def ask(folder: str, batch_size: int, results: Any) -> None:
    """In a process of its own."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    loss = nn.CrossEntropyLoss()
    method = GradDot(net(9), DATA, STATES, loss_fn=loss, batch_size=batch_size, store=folder)
    try:
        results.put(method.influence(TEST).numpy())
    except BaseException as error:
        results.put(repr(error))


def builders(scratch: Path, count: int) -> list[Outcome]:
    """All get the right numbers, and the bytes are those of one builder."""
    method = GradDot(net(9), DATA, STATES, loss_fn=nn.CrossEntropyLoss(), batch_size=2)
    expected = method.influence(TEST)
    results = context().Queue()
    outcomes, whole = [], None
    for number in range(count):
        folder, outcome = scratch / f"builders {number}", Outcome("store of a method", hits=1)
        arguments = str(folder), 2, results
        processes = [context().Process(target=ask, args=arguments) for _ in range(3)]
        for process in processes:
            process.start()
        for _ in processes:
            found = results.get(timeout=120)
            if isinstance(found, str):
                outcome.problems.append(found)
            elif not same([torch.from_numpy(found)], [expected]):
                outcome.problems.append("other numbers")
        for process in processes:
            process.join()
        contents = KINDS["gradients"].files(folder)
        whole = whole or contents
        if contents != whole:
            outcome.problems.append("other bytes")
        outcomes.append(outcome)
        for problem in outcome.problems:
            print(f"builders, try {number}: {problem}", flush=True)
    return outcomes


# Flipped bits.


def flips(scratch: Path, count: int, seed: int) -> list[Outcome]:
    """One flipped bit is noticed, so many times per kind of file."""
    outcomes = []
    for name, kind in KINDS.items():
        folder = scratch / f"flips {name}"
        kind.write(folder, 0)
        contents = kind.files(folder)
        sorts: dict[str, list[str]] = {}
        for file in sorted(contents):
            sorts.setdefault("model" if "-seed" in file else file.split("-")[0], []).append(file)
        draws = random.Random(f"{seed} {name}")
        for sort, files in sorts.items():
            outcome = Outcome(f"{name}: {sort}")
            for _ in range(count):
                file = draws.choice(files)
                data = bytearray(contents[file])
                data[draws.randrange(len(data))] ^= 1 << draws.randrange(8)
                path = folder / kind.holds / file
                path.write_bytes(data)
                try:
                    kind.read(folder, 0)
                    outcome.problems.append(f"a flipped bit of {file} was not noticed")
                except (InvalidArgumentError, UserWarning):
                    outcome.hits += 1
                path.write_bytes(contents[file])
            outcomes.append(outcome)
    return outcomes


# What the system refuses.


def limited(name: str, folder: str, version: int, most: int) -> None:
    """In a process of its own, whose files may not be longer than so many bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    _write_or_exit(KINDS[name], Path(folder), version, {errno.EFBIG})


def as_nobody(name: str, folder: str, version: int) -> None:
    """In a process of its own, of a user who may not write there."""
    with tempfile.TemporaryDirectory() as own:  # nobody may not read the sources that torch wants
        KINDS[name].write(Path(own) / "folder", version)
    os.setuid(NOBODY)
    _write_or_exit(KINDS[name], Path(folder), version, {errno.EACCES, errno.EPERM})


def _write_or_exit(kind: Kind, folder: Path, version: int, codes: set[int]) -> None:
    torch.set_num_threads(1)
    try:
        kind.write(folder, version)
    except StorageError as error:
        os._exit(CLEAR if error.errno in codes and str(folder) in str(error) else FAILED)
    except BaseException as error:
        os.write(2, repr(error).encode())
        os._exit(FAILED)
    os._exit(FINISHED)


def on_full_disk(name: str, folder: str, version: int, pages: int) -> None:
    """In a process of its own, on a disk with so many pages left."""
    disk = Path(folder).parent
    status = os.statvfs(disk)
    (disk / "filler").write_bytes(bytes((status.f_bavail - pages) * status.f_frsize))
    _write_or_exit(KINDS[name], Path(folder), version, {errno.ENOSPC})


def refusals(scratch: Path, seed: int) -> Iterator[Outcome]:
    """Clear errors, and nothing lost: files that may not grow, a full disk, another user."""
    draws = random.Random(seed)
    if os.geteuid() != 0:
        print("not root: no small disk is mounted, and no other user tried")
    for name, kind in KINDS.items():
        largest = max(map(len, _written(kind, scratch / f"size {name}").values()))
        outcome = Outcome(f"{name}: files that may not grow")
        for number in range(8):
            folder = scratch / f"limit {name} {number}"
            _refused(outcome, limited, name, folder, draws.randrange(0, largest))
        yield outcome
        if os.geteuid() == 0:
            yield _on_full_disks(name, draws)
            outcome = Outcome(f"{name}: another user")
            with tempfile.TemporaryDirectory() as shared:
                os.chmod(shared, 0o755)
                _refused(outcome, as_nobody, name, Path(shared) / "folder")
            yield outcome


def _on_full_disks(name: str, draws: random.Random) -> Outcome:
    """On a small disk in memory, of which little is left."""
    outcome = Outcome(f"{name}: full disk")
    for _ in range(8):
        with tempfile.TemporaryDirectory() as disk:
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", disk], check=True)
            try:
                folder, filler = Path(disk) / "folder", Path(disk) / "filler"
                _refused(outcome, on_full_disk, name, folder, draws.randrange(0, 4), filler=filler)
            finally:
                subprocess.run(["umount", "--lazy", disk], check=True)
    return outcome


def _written(kind: Kind, folder: Path) -> dict[str, bytes]:
    kind.write(folder, 0)
    return kind.files(folder)


def _refused(
    outcome: Outcome,
    target: Any,
    name: str,
    folder: Path,
    *more: int,
    filler: Path | None = None,
) -> None:
    """Write in a process that is refused something, over an old version where there may be one."""
    kind = KINDS[name]
    if kind.replaces:
        kind.write(folder, 0)
        value = kind.read(folder, 0)
    version = 1 if kind.replaces else 0
    process = context().Process(target=target, args=(name, str(folder), version, *more))
    process.start()
    process.join()
    outcome.hits += process.exitcode == CLEAR
    if process.exitcode not in (CLEAR, FINISHED):
        outcome.problems.append(f"no clear error: {process.exitcode}")
    if kind.replaces and process.exitcode == CLEAR and not same(kind.read(folder, 0), value):
        outcome.problems.append("the old version is not whole")
    if filler is not None:
        filler.unlink()
    kind.write(folder, version)
    kind.read(folder, version)
    if outcome.problems:
        print(f"{outcome.name}: {outcome.problems[-1]}", flush=True)
