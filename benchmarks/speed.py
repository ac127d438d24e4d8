"""Times the floor, influence_kit and its peers side by side, and writes ``RESULTS.md``.

dattri takes part where it is installed (``pip install dattri==0.3.0 --no-deps``).

The floor is what no exact method can do without, done plainly: the forward and backward passes of
all training and test examples at every checkpoint, with the weights' ordinary gradients. Each round
runs all contenders in turn; the smallest time of the rounds counts. The memory that a call adds is
the growth of the peak of a fresh process.

    python -m benchmarks.speed [--rounds 3] [--case MLP] [--no-peers]
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import captum
import captum.influence
import torch
from torch.utils.data import DataLoader, TensorDataset

import influence_kit
from benchmarks.models import CASES, Case
from influence_kit import TracInCP

RESULTS = Path(__file__).parent / "RESULTS.md"
# the peers have no batch size of their own; this one is near their best on all three
PEER_BATCH = 64
# a contender that takes longer is run once
LONG = 10.0

Contender = Callable[[], None]


def floor(case: Case, batch_size: int, with_tests: bool) -> Contender:
    """Forward and backward passes over the same examples and checkpoints."""
    model, weights = case.build(), case.weights()
    sides = [case.dataset().tensors] + ([case.data(case.q)] if with_tests else [])

    def run() -> None:
        for state in weights:
            model.load_state_dict(state)
            for inputs, targets in sides:
                pieces = zip(inputs.split(batch_size), targets.split(batch_size), strict=True)
                for x, y in pieces:
                    model.zero_grad()
                    case.loss_fn(model(x), y).backward()

    return run


def ours(case: Case, own: bool) -> Contender:
    """influence_kit's TracInCP: the score matrix, or self-influence."""
    influence = TracInCP(case.build(), case.dataset(), case.weights(), loss_fn=case.loss_fn)
    return _call(influence, case, own)


def captums(case: Case, own: bool) -> Contender:
    """Captum's TracInCP on its fast path (sample-wise gradients, where it supports the model)."""
    sample_wise = isinstance(case.loss_fn, torch.nn.CrossEntropyLoss)
    loss_fn = case.loss_fn if sample_wise else _per_example(case)

    def load(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> float:
        model.load_state_dict(state)
        return 1.0

    influence = captum.influence.TracInCP(
        case.build(),
        case.dataset(),
        case.weights(),
        load,
        loss_fn=loss_fn,
        batch_size=PEER_BATCH,
        sample_wise_grads_per_batch=sample_wise,
    )
    return _call(influence, case, own)


def dattris(case: Case) -> Contender:
    """TracIn of dattri without its projection, which gives the same scores."""
    from dattri.algorithm.tracin import TracInAttributor
    from dattri.task import AttributionTask

    model = case.build()

    def loss(parameters: dict[str, torch.Tensor], example: tuple[torch.Tensor, ...]):
        outputs = torch.func.functional_call(model, parameters, (example[0].unsqueeze(0),))
        return case.loss_fn(outputs, example[1].unsqueeze(0))

    attributor = TracInAttributor(
        task=AttributionTask(loss_func=loss, model=model, checkpoints=case.weights()),
        weight_list=torch.ones(case.checkpoints),
        normalized_grad=False,
        projector_kwargs={"proj_type": "identity"},
    )
    train = DataLoader(case.dataset(), batch_size=PEER_BATCH)
    test = DataLoader(TensorDataset(*case.data(case.q)), batch_size=PEER_BATCH)

    def run() -> None:
        with torch.no_grad():
            attributor.attribute(train, test)

    return run


def _per_example(case: Case) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Token losses, one per example: Captum's sample-wise path drops Embedding and LayerNorm."""

    def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        tokens = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), targets, reduction="none"
        )
        return tokens.mean(1)

    loss.reduction = "none"  # type: ignore[attr-defined]
    return loss


def _call(influence: captum.influence.DataInfluence, case: Case, own: bool) -> Contender:
    if own:
        return lambda: influence.self_influence()
    torch.manual_seed(2)
    test = case.data(case.q)
    return lambda: influence.influence(test)


def contenders(case: Case, own: bool, peers: bool) -> dict[str, Contender]:
    """What is timed, by name. The floor has influence_kit's batch size."""
    size = TracInCP(
        case.build(), case.dataset(), case.weights(), loss_fn=case.loss_fn
    ).train_dataloader.batch_size
    found = {"floor": floor(case, size, not own), "influence_kit": ours(case, own)}
    if peers:
        found["captum"] = captums(case, own)
        if not own and find_spec("dattri"):
            found["dattri"] = dattris(case)
    return found


def timed(run: Contender) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def added_memory(case: Case, own: bool, name: str, threads: int) -> float | None:
    """MiB by which one call raises the peak of a fresh process; None if it cannot be measured."""
    if not sys.platform.startswith("linux"):
        return None
    request = json.dumps({"case": case.name, "own": own, "name": name, "threads": threads})
    command = [sys.executable, "-m", "benchmarks.speed", "--memory", request]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _print_added_memory(request: str) -> None:
    wanted = json.loads(request)
    torch.set_num_threads(wanted["threads"])
    case = next(case for case in CASES if case.name == wanted["case"])
    peers = wanted["name"] not in ("floor", "influence_kit")
    run = contenders(case, wanted["own"], peers)[wanted["name"]]
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = _peak()
    run()
    print((_peak() - before) / 2**10)


def _peak() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def rows(case: Case, own: bool, threads: int, rounds: int, peers: bool) -> list[str]:
    """The table's lines for one case."""
    torch.set_num_threads(threads)
    running = contenders(case, own, peers)
    best = {name: timed(run) for name, run in running.items()}  # the first round warms up
    for _ in range(rounds - 1):
        for name, run in running.items():
            if best[name] < LONG:
                best[name] = min(best[name], timed(run))
    what = "self-influence" if own else f"{case.q} x {case.n} scores"
    lines = []
    for name, seconds in best.items():
        memory = added_memory(case, own, name, threads)
        shown = "-" if memory is None else f"{memory:.0f}"
        lines.append(
            f"| {case.name} | {what} | {threads} | {name} | {seconds:.2f} | "
            f"{seconds / best['floor']:.2f} | {shown} |"
        )
        print(lines[-1], flush=True)
    return lines


HEAD = """# Speed

Written by `make bench`. Seconds are the smallest of {rounds} rounds in which all contenders ran in
turn (a contender of more than {long:.0f} s: of one round); the ratio is to the floor, the plain
forward and backward passes over the same examples and checkpoints; added memory is the growth of a
fresh process's peak by one call. All scores are exact (float32). Checkpoints: MLP 3, CNN 1, GPT 1.

{machine}

| model | what | threads | who | seconds | x floor | added MiB |
| --- | --- | --- | --- | --- | --- | --- |
"""


def machine() -> str:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0].partition(":")[2].strip() if models else name
    return (
        f"Machine: {name}, {os.cpu_count()} cores, {platform.system()}; "
        f"Python {platform.python_version()}, "
        f"torch {torch.__version__}, captum {captum.__version__}, influence_kit "
        f"{influence_kit.__version__}."
    )


def write_section(section: str) -> None:
    """Puts a section into ``RESULTS.md``, replacing the one with the same heading."""
    text = RESULTS.read_text() if RESULTS.exists() else ""
    parts = [part.strip() + "\n" for part in re.split(r"(?m)^(?=# )", text) if part.strip()]
    heading = section.splitlines()[0]
    there = [part.splitlines()[0] == heading for part in parts]
    if any(there):
        parts[there.index(True)] = section
    else:
        parts.append(section)
    RESULTS.write_text("\n".join(parts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--case", default="", help="only the cases whose name contains this")
    parser.add_argument("--no-peers", action="store_true", help="only the floor and influence_kit")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.memory:
        _print_added_memory(arguments.memory)
        return
    lines = []
    for case in CASES:
        if arguments.case not in case.name:
            continue
        for own in (False, True):
            for threads in (1, 2):
                peers = not arguments.no_peers
                lines += rows(case, own, threads, arguments.rounds, peers)
    if not arguments.case and not arguments.no_peers:
        head = HEAD.format(rounds=arguments.rounds, long=LONG, machine=machine())
        write_section(head + "\n".join(lines) + "\n")
        print(f"written to {RESULTS.name}")


if __name__ == "__main__":
    main()
