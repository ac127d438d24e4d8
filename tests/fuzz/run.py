"""One seed, one question: drawn, asked, and judged."""

import random
import re
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fuzz.activation_questions import activation_question
from fuzz.curvature_questions import kronecker_question, solved_question
from fuzz.draw import Draw
from fuzz.events import event_question
from fuzz.gradient_questions import gradient_question
from fuzz.projection_questions import projected_question, trak_question
from fuzz.questions import Answers, Question, Void
from fuzz.setups import Setup, draw_setup
from fuzz.state import same_random_states
from fuzz.subjects import draw_subject
from influence_kit import errors

NAMED = (*(v for v in vars(errors).values() if isinstance(v, type)), NotImplementedError)
METHODS: dict[str, tuple[float, Callable[[Draw, Setup], Question]]] = {
    "gradients": (5, gradient_question),
    "solved": (1, solved_question),
    "kronecker": (1, kronecker_question),
    "projected": (2, projected_question),
    "trak": (0.5, trak_question),
    "activations": (1.5, activation_question),
    "events": (0.7, event_question),
}


@dataclass
class Outcome:
    """What came of a seed: "passed", "refused", "void", or a failure.

    Failures are "wrong" numbers, something "changed", and "error": an error of another kind, or a
    refusal of what must be answered; "broken" is the fuzzer itself.
    """

    seed: int
    kind: str
    what: str = ""
    tags: list[str] = field(default_factory=list)
    excuses: list[str] = field(default_factory=list)
    warned: list[str] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)
    trace: str = ""
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        return self.kind in ("wrong", "changed", "error", "broken")


def run(seed: int) -> Outcome:
    """Draw the question of a seed, ask it, and compare."""
    start = time.perf_counter()
    draw = Draw(seed)
    folder = tempfile.TemporaryDirectory()
    with same_random_states(), folder as path, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.manual_seed(seed)
        try:
            outcome = _run(draw, seed, Path(path))
        except Void as void:
            outcome = Outcome(seed, "void", str(void))
        except Exception as error:  # the fuzzer's own
            outcome = Outcome(seed, "broken", repr(error)[:150], trace=_trace(error))
    outcome.tags, outcome.excuses = draw.tags, draw.excuses
    ours = [w for w in caught if "influence_kit" in w.filename or "fuzz" in w.filename]
    outcome.warned = sorted({shape_of(str(w.message)) for w in ours})
    outcome.seconds = time.perf_counter() - start
    return outcome


def _run(draw: Draw, seed: int, folder: Path) -> Outcome:
    setup = draw_setup(draw, draw_subject(draw), folder)
    setup.oracle.check_validity()
    question = draw.call(METHODS, setup)
    mode: Any = nullcontext()
    if draw.chance(0.1):
        draw.note("under no_grad")
        mode = torch.no_grad()
    elif draw.chance(0.03):
        draw.note("under inference_mode")
        mode = torch.inference_mode()
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)
    found: Answers = {}
    error: Exception | None = None
    with mode:
        setup.watch()
        try:
            found = question.ask(question.make())
        except Exception as caught:
            error = caught
        setup.look()
    outcome = _judged(draw, seed, question, found, error)
    outcome.changes = setup.changes
    if setup.changes and not outcome.failed:
        outcome.kind, outcome.what = "changed", shape_of("; ".join(setup.changes[:4]))
    return outcome


def _judged(
    draw: Draw, seed: int, question: Question, found: Answers, error: Exception | None
) -> Outcome:
    if error is not None:
        text = f"{type(error).__name__}: {shape_of(str(error))}"
        legitimate = isinstance(error, NAMED) and bool(draw.excuses)
        return Outcome(seed, "refused" if legitimate else "error", text, trace=_trace(error))
    return _compared(seed, found, question.close)


def _compared(seed: int, found: Answers, close: float) -> Outcome:
    for name, (given, right) in found.items():
        if given.shape != right.shape:
            what = f"{name}: shape {list(given.shape)}, right is {list(right.shape)}"
            return Outcome(seed, "wrong", what)
    largest = max(float(right.abs().max()) for _, right in found.values())
    for name, (given, right) in found.items():
        off = float((given.double() - right.double()).abs().max())
        # of a layer's scores, relative to those of all layers
        if not off <= close * max(largest, 1e-12):
            return Outcome(seed, "wrong", f"{name}: off by {off / max(largest, 1e-12):.2g}")
    return Outcome(seed, "passed")


def _trace(error: Exception | None) -> str:
    return "" if error is None else "".join(traceback.format_exception(error))


def shape_of(message: str) -> str:
    """A message without its numbers and names, to count those of a kind."""
    first = message.splitlines()[0] if message else ""
    plain = re.sub(r"-?\d+(\.\d+)?(e[+-]?\d+)?", "N", re.sub(r"'[^']*'", "'...'", first))
    return re.sub(r"\[[N', .]*\]", "[...]", plain)[:150]
