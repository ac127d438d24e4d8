"""Every argument of every public function, replaced by bad values in turn; damaged folders.

``python -m fuzz.bad_input`` (with ``PYTHONPATH=tests:.``) tries all public classes and functions,
and damaged folders of checkpoints, stores, saves, traces, retrained models and activations. It
counts how the calls ended, and prints those that ended badly. Endings:

- clear: an error raised by a ``raise`` of this package, or of the user's own function;
- theirs: an error from inside the user's own model, loss or function;
- raw: an error from inside torch, numpy, matplotlib or an expression of this package;
- fine: the bad value is a good one for this argument (``None`` where an argument may be left out),
  or the damage has done no harm;
- changed: objects or files of the user's are not what they were before the call;
- let in: the call returned, though the value means nothing there, or returned wrong numbers;
- hung: it took longer than some seconds;
- too large: it took more memory than 2 GiB.

Every call runs in a folder of its own; ``watch.py`` says what is looked at around it.
"""

import argparse
import faulthandler
import linecache
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch

import influence_kit
from fuzz.bad_values import BAD
from fuzz.watch import PATIENCE, Changed, Hung, LetIn, TooLarge, limit_memory, watched

PACKAGE = str(Path(influence_kit.__file__).parent)
HERE = str(Path(__file__).parents[1])  # the models, losses and functions of users
# torch's code that calls a model or a loss
CALL = str(Path("torch", "nn", "modules", "module.py"))

MOST_RAW = 0.02  # of the bad values
WORSE = {Changed: "changed", Hung: "hung", LetIn: "let in", TooLarge: "too large"}
BADLY = (*WORSE.values(),)


@dataclass
class Target:
    """A function with arguments that it takes, each made anew for every call.

    Attributes:
        name: what to call it.
        call: the function.
        good: ``{argument: makes a good value}``.
        fine: ``{argument: names of bad values that are good ones there}``.
        bad: ``{name: makes a bad value}``.
        changed: the arguments that the call is there to change.
    """

    name: str
    call: Callable[..., Any]
    good: dict[str, Callable[[], Any]]
    fine: dict[str, set[str]] = field(default_factory=dict)
    bad: dict[str, Callable[[], Any]] = field(default_factory=lambda: BAD)
    changed: tuple[str, ...] = ()


class Ending(NamedTuple):
    """How a call with one bad value ended."""

    target: str
    argument: str
    value: str
    kind: str
    what: str


def endings(targets: Iterable[Target], seed: int = 0, share: float = 1.0) -> Iterator[Ending]:
    """Call each target with each bad value for each argument; of all, a share drawn by the seed."""
    drawn = random.Random(seed)
    for target in targets:
        for argument in target.good:
            for name, make in target.bad.items():
                if drawn.random() < share:
                    yield _ending(target, argument, name, make)


def _ending(target: Target, argument: str, name: str, make: Callable[[], Any]) -> Ending:
    given = {key: good() for key, good in target.good.items() if key != argument}
    given[argument] = make()
    try:
        with watched(given, target.changed):
            found = repr(target.call(**given))
    except tuple(WORSE) as worse:
        kind, what = WORSE[type(worse)], str(worse)
    except Exception as error:
        kind, what = _kind_of(error), f"{type(error).__name__}: {error}"
    else:
        as_name = "text" if name == "marked text" else name
        fine = as_name in target.fine.get(argument, set())
        kind, what = "fine" if fine else "let in", found
    return Ending(target.name, argument, name, kind, what[:200])


def _kind_of(error: BaseException) -> str:
    """Whether an error was raised by a ``raise`` of the package or by the user's own code."""
    frames = list(traceback.walk_tb(error.__traceback__))
    files = [frame.f_code.co_filename for frame, _ in frames]
    if any(file.startswith(PACKAGE) for file in files) and (
        files[-1].startswith(HERE) or any(file.endswith(CALL) for file in files)
    ):
        return "theirs"
    is_raise = linecache.getline(files[-1], frames[-1][1]).strip().startswith("raise")
    return "clear" if files[-1].startswith(PACKAGE) and is_raise else "raw"


def main(parts: Iterable[tuple[Iterable[Target], float]], seed: int = 0) -> int:
    """Print the counts, and the calls that ended badly, of a share of each part's targets."""
    found, start = [], time.perf_counter()
    for ending in chain.from_iterable(endings(some, seed, share) for some, share in parts):
        found.append(ending)
        # what no signal reaches, a loop in C, ends the process with a traceback
        faulthandler.dump_traceback_later(3 * PATIENCE, exit=True)
        if ending.kind in (*BADLY, "raw"):
            where = f"{ending.target}({ending.argument}={ending.value})"
            print(f"{ending.kind}: {where}: {' '.join(ending.what.split())}", flush=True)
    faulthandler.cancel_dump_traceback_later()
    counts = Counter(ending.kind for ending in found)
    bad = len(found) - counts["fine"]
    print(f"{len(found)} calls: {dict(counts)}; raw {counts['raw'] / bad:.2%} of {bad} bad ones")
    print(f"in {time.perf_counter() - start:.0f} s")
    return int(counts["raw"] > MOST_RAW * bad or sum(counts[kind] for kind in BADLY) > 0)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=20_000, help="about how many calls")
    parser.add_argument("--seed", type=int, default=0, help="decides which of them")
    parser.add_argument("--parts", nargs="*", help="of which tables of targets; all by default")
    return parser.parse_args()


if __name__ == "__main__":
    from fuzz.tables import TABLES, shares

    torch.set_num_threads(1)
    limit_memory()
    asked = arguments()
    names = asked.parts or list(TABLES)
    share = shares({name: TABLES[name] for name in names}, asked.calls)
    sys.exit(main([(TABLES[name], share[name]) for name in names], asked.seed))
