"""``python -m fuzz --count 5000``: many seeds; ``python -m fuzz --seed 17``: one, explained."""

import argparse
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

import torch

from fuzz.run import Outcome, run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200, help="how many seeds")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--seed", type=int, help="one seed, with its traceback")
    parser.add_argument("--processes", type=int, default=1)
    given = parser.parse_args()
    if given.seed is not None:
        return _explain(run(given.seed))
    start = time.perf_counter()
    seeds = range(given.first, given.first + given.count)
    outcomes = []
    for outcome in _outcomes(seeds, given.processes):
        outcomes.append(outcome)
        if outcome.failed:
            print(f"seed {outcome.seed}: {outcome.kind}: {outcome.what}", flush=True)
    report(outcomes)
    print(f"in {time.perf_counter() - start:.0f} s")
    return int(any(outcome.failed for outcome in outcomes))


def _one_thread() -> None:
    torch.set_num_threads(1)


def _outcomes(seeds: range, processes: int):
    _one_thread()
    if processes == 1:
        yield from map(run, seeds)
        return
    with ProcessPoolExecutor(processes, initializer=_one_thread) as pool:
        yield from pool.map(run, seeds, chunksize=20)


def _explain(outcome: Outcome) -> int:
    print(f"seed {outcome.seed}: {outcome.kind}: {outcome.what}")
    print("drawn:", ", ".join(outcome.tags))
    if outcome.changes:
        print("changed:", "; ".join(outcome.changes))
    print("may be refused for:", ", ".join(outcome.excuses) or "nothing")
    for warning in outcome.warned:
        print("warned:", warning)
    print(outcome.trace)
    return int(outcome.failed)


def report(outcomes: list[Outcome]) -> None:
    """Counts, the kinds that failures share, and how to see one again."""
    counts = Counter(outcome.kind for outcome in outcomes)
    failed = [outcome for outcome in outcomes if outcome.failed]
    print()
    for title, kind in (("refused", "refused"), ("no right answer", "void")):
        _table(title, Counter(o.what for o in outcomes if o.kind == kind))
    _table("warned", Counter(w for o in outcomes for w in o.warned))
    for kind in ("wrong", "changed", "error", "broken"):
        mine = [o for o in failed if o.kind == kind]
        if mine:
            print(f"{kind}: {len(mine)}; kinds that explain them:")
            for line in blamed(mine, outcomes):
                print("  ", line)
    print(
        f"{counts['passed']} passed, {len(failed)} failed ({counts['wrong']} wrong, "
        f"{counts['changed']} changed, {counts['error']} errors), {counts['refused']} refused, "
        f"{counts['void']} without a right answer"
    )
    if failed:
        print(f"see one again: PYTHONPATH=tests:. python -m fuzz --seed {failed[0].seed}")


def _table(title: str, counter: Counter) -> None:
    for text, count in counter.most_common(12):
        print(f"{title} {count}: {text}")


def blamed(failed: list[Outcome], outcomes: list[Outcome]) -> list[str]:
    """Tags one after the other by the share of their outcomes that failed, until none is left."""
    lines, left = [], list(failed)
    while left:
        counts = Counter(tag for o in left for tag in o.tags)
        totals = Counter(tag for o in outcomes if o.kind != "void" for tag in o.tags)
        tag = max(counts, key=lambda t: (counts[t] / (totals[t] + 2), counts[t]))
        own = [o for o in left if tag in o.tags]
        seeds = ", ".join(str(o.seed) for o in own[:8])
        lines.append(f"{tag}: {len(own)} of {totals[tag]} (seeds {seeds}): {own[0].what}")
        left = [o for o in left if tag not in o.tags]
    return lines


if __name__ == "__main__":
    sys.exit(main())
