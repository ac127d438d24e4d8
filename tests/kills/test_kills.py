"""A few kills and interrupts of each way of writing; ``make kills`` sends many more."""

import random
import signal
import sys
from pathlib import Path

import pytest
from folders import KINDS
from safetensors.torch import save_file

from kills.__main__ import report
from kills.others import flips
from kills.run import Outcome, Reference, Server, Try, attempt, reference
from kills.works import FOREIGN, WORKS

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="has no SIGKILL")
FAST = [name for name, work in WORKS.items() if not work.is_slow]


@pytest.fixture(scope="module")
def server() -> Server:
    return Server()


@pytest.mark.slow
@pytest.mark.parametrize("name", FAST)
def test_nothing_finished_is_lost(name: str, server: Server, tmp_path: Path) -> None:
    whole = reference(server, name, tmp_path)
    for seed, number in ((0, signal.SIGKILL), (1, signal.SIGKILL), (2, signal.SIGINT)):
        outcome = attempt(server, name, whole, tmp_path / "try", seed, number)
        assert outcome.problems == []


# The harness notices what it is there for.


class Quiet(Server):
    """Runs nothing."""

    def __init__(self, code: int = 0, done: int = 0) -> None:
        self._answer = code, done, 0.0

    def run(self, *_: object, **__: object) -> tuple[int, int, float]:
        return self._answer


def whole_trace(folder: Path) -> Reference:
    KINDS["trace"].write(folder, 0)
    return Reference(folder, KINDS["trace"].files(folder), 0.1, KINDS["trace"].read(folder, 0))


def test_the_harness_tells_what_is_wrong(tmp_path: Path) -> None:
    whole = whole_trace(tmp_path / "whole")
    one = Try(Quiet(1, done=2), "trace", whole, tmp_path / "try")
    save_file({}, tmp_path / "try" / "step-0.safetensors")
    (tmp_path / "try" / next(iter(FOREIGN))).unlink()
    one.disturb(random.Random(0), signal.SIGKILL)
    told = " ".join(one.outcome.problems)
    for words in ("ended 1", "was touched", "has other bytes", "2 pieces were finished, 1 are"):
        assert words in told
    (tmp_path / "try" / "step-0.safetensors").unlink()
    one.disturb(random.Random(0), signal.SIGKILL)
    assert "a finished file was lost" in one.outcome.problems[-1]


def test_the_harness_compares_old_and_new(tmp_path: Path) -> None:
    kind = KINDS["fit"]
    for version in (0, 1):
        kind.write(tmp_path / str(version), version)
    old, new = (kind.read(tmp_path / str(version), version) for version in (0, 1))
    files = kind.files(tmp_path / "1")
    whole = Reference(tmp_path / "1", files, 0.1, new, (tmp_path / "0", old))
    one = Try(Quiet(), "second save", whole, tmp_path / "try")
    one.disturb(random.Random(0), signal.SIGKILL)
    assert one.outcome.problems == []
    for file in (tmp_path / "try").glob("tensors-????????????????.*"):
        file.unlink()
    one.disturb(random.Random(0), signal.SIGKILL)
    assert "neither old nor new contents are whole" in one.outcome.problems[-1]


def test_bits_are_flipped_in_every_sort_of_file(tmp_path: Path) -> None:
    outcomes = flips(tmp_path, 1, 0)
    assert len(outcomes) == 13
    assert all(outcome.hits == 1 and not outcome.problems for outcome in outcomes)


def test_the_report_fails_on_any_problem(capsys: pytest.CaptureFixture[str]) -> None:
    assert not report("SIGKILL", [Outcome("save", 2)])
    assert report("SIGKILL", [Outcome("save", 2), Outcome("save", 0, ["lost"])])
    assert "save                             2 hits    1 with problems" in capsys.readouterr().out
