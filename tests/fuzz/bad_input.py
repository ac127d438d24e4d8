"""Every argument of every public function, replaced by bad values in turn.

``python -m fuzz.bad_input`` (with ``PYTHONPATH=tests:.``) tries the functions of ``evaluation``,
``valuation`` and ``viz``, the classes and functions of the package itself, and damaged folders of
checkpoints, counts how they ended, and prints the calls that ended badly. Endings:

- clear: an error raised by a ``raise`` of this package, or of the user's own function;
- theirs: an error from inside the user's own model, loss or function;
- raw: an error from inside torch, numpy, matplotlib or an expression of this package;
- fine: the bad value is a good one for this argument (``None`` where an argument may be left out);
- changed: objects that were given are not what they were before the call;
- let in: the call returned, though the value means nothing there;
- hung: it took longer than ``LIMIT`` seconds.
"""

import linecache
import random
import signal
import sys
import traceback
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

import influence_kit

PACKAGE = str(Path(influence_kit.__file__).parent)
HERE = str(Path(__file__).parent)
# torch's code that calls a model or a loss
CALL = str(Path("torch", "nn", "modules", "module.py"))


LIMIT = 5
MOST_RAW = 0.02  # of the bad values
OF_METHODS = 0.2  # of all calls of methods, as many as take a few minutes
BADLY = ("let in", "hung", "changed")


class Hung(BaseException):
    """Raised in a call that takes too long."""


class Changed(BaseException):
    """Raised after a call that changed the objects that it was given."""


class Plain:
    """An object of a user's that is none of what is asked for."""


BAD: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "True": lambda: True,
    "False": lambda: False,
    "0": lambda: 0,
    "-1": lambda: -1,
    "2": lambda: 2,
    "1.5": lambda: 1.5,
    "-0.5": lambda: -0.5,
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "10**30": lambda: 10**30,
    "1j": lambda: 1j,
    "text": lambda: "text",
    "empty text": lambda: "",
    "bytes": lambda: b"abc",
    "object": Plain,
    "class": lambda: Plain,
    "function": lambda: Plain.__init__,
    "module": lambda: types.ModuleType("given"),
    "nn.Module": lambda: nn.Linear(2, 2),
    "[]": lambda: [],
    "[None]": lambda: [None],
    "list of text": lambda: ["a", "b", "c"],
    "ragged": lambda: [[1.0], [1.0, 2.0]],
    "list of nan": lambda: [float("nan")] * 6,
    "list of 10**400": lambda: [10**400] * 6,
    "list of bools": lambda: [True, False] * 3,
    "negative list": lambda: [-1, -2, -3],
    "nested tensors": lambda: [torch.zeros(2), torch.zeros(3)],
    "{}": dict,
    "dict": lambda: {"a": 1},
    "dict of numbers": lambda: {0: 1.0, 1: 2.0},
    "set": lambda: {1.0, 2.0, 3.0},
    "generator": lambda: (i for i in range(6)),
    "iterator": lambda: iter([1.0, 2.0]),
    "empty tensor": lambda: torch.zeros(0),
    "empty matrix": lambda: torch.zeros(0, 6),
    "0-d tensor": lambda: torch.tensor(3.0),
    "4-d tensor": lambda: torch.zeros(2, 2, 2, 2),
    "long tensor": lambda: torch.zeros(11),
    "tensor of nan": lambda: torch.full((3, 6), torch.nan),
    "tensor with inf": lambda: torch.full((6,), torch.inf),
    "complex tensor": lambda: torch.zeros(3, 6, dtype=torch.complex64),
    "bool tensor": lambda: torch.ones(3, 6, dtype=torch.bool),
    "meta tensor": lambda: torch.zeros(3, 6, device="meta"),
    "sparse tensor": lambda: torch.zeros(3, 6).to_sparse(),
    "tensor of 2**62": lambda: torch.full((6,), 2**62),
    "0-d array": lambda: np.array(3.0),
    "array of objects": lambda: np.array([None, "a", 1, 2, 3, 4], dtype=object),
    "array of text": lambda: np.array(["a"] * 6),
    "array of dates": lambda: np.array(["2020-01-01"] * 6, dtype="datetime64[D]"),
    "masked array": lambda: np.ma.masked_array(np.ones((3, 6)), mask=np.eye(3, 6)),
}
NONE, FLAGS = {"None"}, {"True", "False"}


@dataclass
class Target:
    """A function with arguments that it takes, each made anew for every call.

    Attributes:
        name: what to call it.
        call: the function.
        good: ``{argument: makes a good value}``.
        fine: ``{argument: names of BAD values that are good ones there}``.
    """

    name: str
    call: Callable[..., Any]
    good: dict[str, Callable[[], Any]]
    fine: dict[str, set[str]] = field(default_factory=dict)


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
    signal.signal(signal.SIGALRM, _hang)
    for target in targets:
        for argument in target.good:
            for name, make in BAD.items():
                if drawn.random() < share:
                    yield _ending(target, argument, name, make)


def _hang(*_: Any) -> None:
    raise Hung


def _ending(target: Target, argument: str, name: str, make: Callable[[], Any]) -> Ending:
    given = {key: good() for key, good in target.good.items() if key != argument}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            signal.alarm(LIMIT)
            found = repr(target.call(**given, **{argument: make()}))
            signal.alarm(0)
        except Hung:
            kind, what = "hung", ""
        except Changed as change:
            signal.alarm(0)
            kind, what = "changed", str(change)
        except Exception as error:
            signal.alarm(0)
            kind, what = _kind_of(error), f"{type(error).__name__}: {error}"
        else:
            fine = name in target.fine.get(argument, set())
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


def main(parts: Iterable[tuple[Iterable[Target], float]]) -> int:
    """Print the counts, and the calls that ended badly, of a share of each part's targets."""
    found = []
    for ending in chain.from_iterable(endings(some, share=share) for some, share in parts):
        found.append(ending)
        if ending.kind in (*BADLY, "raw"):
            where = f"{ending.target}({ending.argument}={ending.value})"
            print(f"{ending.kind}: {where}: {ending.what}", flush=True)
    counts = Counter(ending.kind for ending in found)
    bad = len(found) - counts["fine"]
    print(f"{len(found)} calls: {dict(counts)}; raw {counts['raw'] / bad:.1%} of {bad} bad ones")
    return int(counts["raw"] > MOST_RAW * bad or sum(counts[kind] for kind in BADLY) > 0)


if __name__ == "__main__":
    from fuzz.evaluation_targets import TARGETS
    from fuzz.folder_targets import TARGETS as FOLDERS
    from fuzz.method_targets import TARGETS as METHODS

    torch.set_num_threads(1)
    sys.exit(main([(TARGETS, 1.0), (FOLDERS, 1.0), (METHODS, OF_METHODS)]))
