"""What the checks of a question cost: the time within them, against all other time of the question.

``python -m benchmarks.checks`` prints; ``--write`` puts the section into RESULTS.md.
"""

import argparse
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from benchmarks.models import CASES, Case
from benchmarks.speed import machine, write_section
from influence_kit import TracInCP
from influence_kit.data.checked_batches import CheckedBatches
from influence_kit.gradients.gradient_source import GradientSource
from influence_kit.losses.loss import Loss
from influence_kit.methods.base import ExampleInfluence
from influence_kit.methods.caches import Caches

# what is verification and no part of the scores
CHECKS: dict[str, list[tuple[type, str]]] = {
    "gradients": [(GradientSource, "_first_check"), (GradientSource, "_check_again")],
    "loss": [(Loss, "_compare")],
    "data": [(CheckedBatches, "check_draws"), (CheckedBatches, "_compare")],
    "what is kept": [
        (Caches, "check_sources"),
        (Caches, "check_weights"),
        (Caches, "note"),
        (Caches, "note_given"),
    ],
    "the model": [(ExampleInfluence, "_probe")],
}
ROUNDS = 5
HEAD = """# Checks

Written by `python -m benchmarks.checks --long --write`. The time within the checks of a question
(the page "What is checked, and when"), in percent of all other time of that question: of the first
question of an object, and the median of {rounds} later ones. {threads} thread, float32, TracInCP.

{machine}

| model | what | batches | first | later | of which gradients |
| --- | --- | ---: | ---: | ---: | ---: |
"""


@contextmanager
def counted() -> Iterator[dict[str, float]]:
    """Seconds within the checks, by kind; a check within a check counts once."""
    seconds = dict.fromkeys(CHECKS, 0.0)
    inside: list[str] = []
    usual = {place: getattr(*place) for places in CHECKS.values() for place in places}

    def timing(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if inside:
                return function(*args, **kwargs)
            inside.append(kind)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[kind] += time.perf_counter() - start
                inside.clear()

        return run

    try:
        for kind, places in CHECKS.items():
            for place in places:
                setattr(*place, timing(kind, usual[place]))
        yield seconds
    finally:
        for place, function in usual.items():
            setattr(*place, function)


def share(question: Callable[[], Any]) -> tuple[float, float]:
    """The time within checks, and within those of gradients, in percent of all other time."""
    with counted() as seconds:
        start = time.perf_counter()
        question()
        total = time.perf_counter() - start
    checks = sum(seconds.values())
    return 100 * checks / (total - checks), 100 * seconds["gradients"] / (total - checks)


def row(case: Case, own: bool) -> str:
    """One line of the table."""
    tracin = TracInCP(case.build(), case.dataset(), case.weights(), loss_fn=case.loss_fn)
    torch.manual_seed(2)
    test = case.data(case.q)
    question = tracin.self_influence if own else lambda: tracin.influence(test)
    first, _ = share(question)
    later = sorted(share(question) for _ in range(ROUNDS))[ROUNDS // 2]
    batches = len(tracin.train_dataloader)
    what = "self-influence" if own else f"{case.q} x {case.n} scores"
    line = (
        f"| {case.name} | {what} | {batches} | {first:.1f}% | {later[0]:.1f}% | {later[1]:.1f}% |"
    )
    print(line, flush=True)
    return line


def long_pass(case: Case) -> Case:
    """The case with a pass of 200 batches."""
    size = TracInCP(
        case.build(), case.dataset(), case.weights(), loss_fn=case.loss_fn
    ).train_dataloader.batch_size
    # of the largest batches fewer examples do
    return replace(case, n=200 * min(size, 64), checkpoints=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--long", action="store_true", help="also passes of 200 batches")
    parser.add_argument("--write", action="store_true", help="put the table into RESULTS.md")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    warnings.simplefilter("ignore")
    lines = [row(case, own) for case in CASES for own in (False, True)]
    if given.long:
        lines += [row(long_pass(case), True) for case in CASES]
    if given.write:
        head = HEAD.format(rounds=ROUNDS, threads=given.threads, machine=machine())
        write_section(head + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
