"""``python -m kills --kills 300 --interrupts 500``: kills and interrupts at random moments."""

import argparse
import signal
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch

from kills.others import builders, flips, refusals
from kills.run import Outcome, Server, attempt, reference
from kills.works import WORKS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=300, help="how many SIGKILLs, at least")
    parser.add_argument("--interrupts", type=int, default=500, help="how many SIGINTs, at least")
    parser.add_argument("--builders", type=int, default=20, help="tries of two builders, a reader")
    parser.add_argument("--flips", type=int, default=100, help="flipped bits per kind of file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--works", nargs="*", default=list(WORKS), choices=list(WORKS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    start, failed = time.perf_counter(), False
    with tempfile.TemporaryDirectory() as scratch:
        server = Server()
        for number, count in ((signal.SIGKILL, given.kills), (signal.SIGINT, given.interrupts)):
            outcomes = signals(server, given.works, number, count, given.seed, Path(scratch))
            failed |= report(signal.Signals(number).name, outcomes)
        for name, outcomes in (
            ("two builders and a reader", builders(Path(scratch), given.builders)),
            ("flipped bits", flips(Path(scratch), given.flips, given.seed)),
            ("full disks and permissions", refusals(Path(scratch), given.seed)),
        ):
            failed |= report(name, outcomes)
    print(f"in {time.perf_counter() - start:.0f} s")
    return int(failed)


def signals(
    server: Server, names: list[str], number: int, count: int, seed: int, scratch: Path
) -> list[Outcome]:
    """Tries of all works in turn, until so many signals have met them at work."""
    folder = scratch / signal.Signals(number).name
    folder.mkdir()
    wholes = {name: reference(server, name, folder) for name in names} if count else {}
    outcomes: list[Outcome] = []
    hits = 0
    while hits < count:
        name = names[len(outcomes) % len(names)]
        # processes of joblib take seconds to start: one round of four
        is_turn = not WORKS[name].is_slow or len(outcomes) // len(names) % 4 == 0
        if is_turn:
            target = folder / f"try {len(outcomes)}"
            outcomes.append(
                attempt(server, name, wholes[name], target, seed + len(outcomes), number)
            )
        else:
            outcomes.append(Outcome(name))
        hits += outcomes[-1].hits
        for problem in outcomes[-1].problems:
            print(f"{name}, try {len(outcomes) - 1}: {problem}", flush=True)
    return outcomes


def report(what: str, outcomes: list[Outcome]) -> bool:
    """Print a table; whether anything was not as it must be."""
    hits: dict[str, int] = defaultdict(int)
    problems: dict[str, int] = defaultdict(int)
    for outcome in outcomes:
        hits[outcome.name] += outcome.hits
        problems[outcome.name] += bool(outcome.problems)
    print(f"{what}: {sum(hits.values())} hits, {sum(problems.values())} tries with problems")
    for name, count in hits.items():
        print(f"  {name:28} {count:5} hits  {problems[name]:3} with problems")
    return any(problems.values())


if __name__ == "__main__":
    sys.exit(main())
