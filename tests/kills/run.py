"""One try: a folder is written in a process that is killed, up to three times, then finished."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from server_processes import context

from influence_kit.storage.atomic import is_temporary
from influence_kit.storage.locks import LOCK
from kills.works import FOREIGN, WORKS, ModelChangedError, Work

FINISHED, FAILED, INTERRUPTED, CHANGED = 0, 1, 3, 4
PATIENCE = 120


@dataclass
class Outcome:
    """What became of a try.

    Args:
        name: of the work.
        hits: how many signals met it at work.
        problems: what was not as it must be.
    """

    name: str
    hits: int = 0
    problems: list[str] = field(default_factory=list)


def work(name: str, folder: str, progress: Any) -> None:
    """In a process of its own, which leads a group with the workers that it starts."""
    os.setsid()
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = FINISHED
    try:
        progress.send((time.monotonic(), 0))
        WORKS[name].kind.write(
            Path(folder), WORKS[name].version, lambda done: progress.send((time.monotonic(), done))
        )
    except KeyboardInterrupt:
        code = INTERRUPTED
    except ModelChangedError:
        code = CHANGED
    except BaseException:
        traceback.print_exc()
        code = FAILED
    os._exit(code)


class Server:
    """Starts processes that have imported everything already."""

    def __init__(self) -> None:
        self._context = context()

    def run(
        self, name: str, folder: Path, moment: float | None, number: int = signal.SIGKILL
    ) -> tuple[int | None, int, float]:
        """Do a work, and send a signal after so many seconds.

        Returns:
            the exit code, how many pieces were reported as finished, and the seconds that it took.
        """
        receiver, sender = self._context.Pipe(duplex=False)
        process = self._context.Process(target=work, args=(name, str(folder), sender))
        process.start()
        sender.close()
        begun, done = receiver.recv()
        if moment is not None:
            process.join(moment)
            with suppress(ProcessLookupError):  # it has ended by now
                if process.exitcode is None and process.pid is not None:
                    os.kill(process.pid, number)
        process.join(PATIENCE)
        last = begun
        while True:
            try:
                last, done = receiver.recv()
            except EOFError:
                break
        code, seconds = process.exitcode, last - begun
        if process.pid is not None:
            with suppress(ProcessLookupError):  # workers outlive a killed parent by minutes
                os.killpg(process.pid, signal.SIGKILL)
        process.join()
        return (None, done, PATIENCE) if code is None else (code, done, seconds)


@dataclass
class Reference:
    """What a work writes when nothing disturbs it.

    Args:
        folder: where.
        files: its contents.
        seconds: how long it takes.
        value: what is read from it.
        old: where the version before stands, if the work replaces one, and what is read from it.
    """

    folder: Path
    files: dict[str, bytes]
    seconds: float
    value: list[torch.Tensor]
    old: tuple[Path, list[torch.Tensor]] | None = None


def reference(server: Server, name: str, scratch: Path) -> Reference:
    """Do a work once, undisturbed."""
    job, folder = WORKS[name], scratch / f"{name} whole"
    code, _, seconds = server.run(name, folder, None)
    assert code == FINISHED, f"{name} does not work at all"
    value = job.kind.read(folder, job.version)
    old = None
    if job.old is not None:
        path = scratch / f"{name} old"
        job.kind.write(path, job.old)
        old = path, job.kind.read(path, job.old)
    return Reference(folder, job.kind.files(folder), max(seconds, 0.02), value, old)


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(torch.allclose(one, other, rtol=1e-12, atol=1e-14) for one, other in pairs)


class Try:
    """A folder, from its start over some signals to its end."""

    def __init__(self, server: Server, name: str, whole: Reference, folder: Path) -> None:
        self._server, self._whole, self._folder = server, whole, folder
        self._job: Work = WORKS[name]
        self.outcome = Outcome(name)
        self._there: dict[str, int] = {}
        self._foreign: dict[str, bytes] = {}
        self._was_killed = False
        if self._job.start is not None:
            self._job.start(folder, whole.folder)
        if whole.old is not None:
            shutil.copytree(whole.old[0], folder)
        if folder.is_dir():
            self._foreign = FOREIGN
            for file, text in FOREIGN.items():
                (folder / self._job.kind.holds / file).write_bytes(text)

    def disturb(self, draws: random.Random, number: int) -> None:
        """Do the work, send a signal at a random moment, and look at what is there."""
        moment = draws.uniform(0, 1.2 * self._whole.seconds)
        code, done, _ = self._server.run(self.outcome.name, self._folder, moment, number)
        self.outcome.hits += code in (-signal.SIGKILL, INTERRUPTED)
        self._was_killed |= code == -signal.SIGKILL
        if code not in (FINISHED, -number, INTERRUPTED):
            self._wrong(
                {CHANGED: "left the model changed", None: "hangs"}.get(code, f"ended {code}")
            )
        self._look(done)

    def finish(self) -> None:
        """Do the work to its end, and compare with what nothing disturbed."""
        code, _, _ = self._server.run(self.outcome.name, self._folder, None)
        if code != FINISHED:
            self._wrong(f"could not be finished: {code}")
            return
        contents = self._job.kind.files(self._folder)
        self._look(self._job.pieces)
        own = {name: data for name, data in contents.items() if name not in self._foreign}
        if self._whole.old is not None:
            # a kill after the new manifest: files of the old contents wait for the next writer
            old = self._job.kind.files(self._whole.old[0])
            own = {n: d for n, d in own.items() if n in self._whole.files or old.get(n) != d}
        if self._was_killed:
            # at the very end: nothing was left to write, and so nobody to clear away what is left
            own = {n: d for n, d in own.items() if n != LOCK and not is_temporary(n)}
        if own != self._whole.files:
            odd = {*own.items()} ^ {*self._whole.files.items()}
            self._wrong(f"files differ: {sorted({name for name, _ in odd})}")
        if not same(self._job.kind.read(self._folder, self._job.version), self._whole.value):
            self._wrong("other numbers are read")

    def _wrong(self, what: str) -> None:
        self.outcome.problems.append(what)

    def _look(self, done: int) -> None:
        """What must hold at every moment."""
        contents = self._job.kind.files(self._folder)
        for name, data in self._foreign.items():
            if contents.get(name) != data:
                self._wrong(f"the user's {name} was touched")
        if self._job.pieces:
            self._look_at_pieces(contents, done)
        elif self._whole.old is not None or done:
            self._look_at_contents(done)

    def _look_at_pieces(self, contents: dict[str, bytes], done: int) -> None:
        expected = self._whole.files
        for name in contents.keys() & expected.keys() - {MANIFEST_NAME}:
            if contents[name] != expected[name] and not name.startswith("final"):
                self._wrong(f"{name} has other bytes")
        # workers of joblib may outlive the run that was killed, and finish what they were at; what
        # is final is written again where a trace is finished again
        once = not self._job.is_slow
        there = {
            path.name: path.stat().st_ino if once else 0
            for path in self._folder.glob("*.safetensors")
            if path.name not in self._foreign and path.stem != "final"
        }
        if len(there) < done:
            self._wrong(f"{done} pieces were finished, {len(there)} are there")
        if not self._there.items() <= there.items():
            self._wrong("a finished file was lost or written again")
        self._there = there

    def _look_at_contents(self, done: int) -> None:
        """The old contents or the new ones are whole; the new ones, where they were finished."""
        versions = [(self._job.version, self._whole.value)]
        if self._whole.old is not None and self._job.old is not None and not done:
            versions.append((self._job.old, self._whole.old[1]))
        errors = []
        for version, value in versions:
            try:
                if same(self._job.kind.read(self._folder, version), value):
                    return
                errors.append(f"version {version} gives other numbers")
            except Exception as error:
                errors.append(f"version {version}: {error!r}")
        self._wrong(f"neither old nor new contents are whole: {errors}")


MANIFEST_NAME = "manifest.json"


def attempt(
    server: Server, name: str, whole: Reference, folder: Path, seed: int, number: int
) -> Outcome:
    """A whole try; the seed decides on the moments."""
    draws = random.Random(f"{seed} {name} {number}")
    one = Try(server, name, whole, folder)
    for _ in range(draws.randint(1, 3)):
        one.disturb(draws, number)
    one.finish()
    shutil.rmtree(folder)
    return one.outcome
