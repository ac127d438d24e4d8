"""What a question costs with each method, in passes over the data, and the memory that it adds.

``python -m benchmarks.costs`` prints; ``--write`` puts the section into RESULTS.md.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch

import influence_kit
from benchmarks.models import CASES, Case
from benchmarks.peak_memory import added_mebibytes
from benchmarks.speed import floor, machine, timed, write_section

MLP, GPT = CASES[0], CASES[2]
PASSES = 3  # of which the quickest counts
HEAD = """# Costs

Written by `python -m benchmarks.costs --write`. A question is the scores of all test examples with
all training examples ({sizes}); the first includes all that a method fits or keeps, the next is
asked of the same object about the same examples. In multiples of the plain forward and backward
passes over the same training and test examples; added memory is the growth of the peak of a fresh
process by both questions. One checkpoint, defaults, float32, {threads} thread. CG and LiSSA (depth
{depth}) carry every test example through every product, and are asked about {few}. An empty cell:
not for this model, or too long.

{machine}

| method | {heads} |
| --- |{rules}
"""
DEPTH, FEW_TESTS = 100, 8
Keywords = dict[str, Any]


class Cost(NamedTuple):
    """Of one method and model."""

    first: float
    next: float
    mebibytes: float | None


def anything(case: Case, folder: str) -> Keywords:
    """Of most methods."""
    return {"checkpoints": case.weights()[:1], "loss_fn": case.loss_fn}


def with_last_layer(case: Case, folder: str) -> Keywords:
    """Of methods of the last layer."""
    return {**anything(case, folder), "final_fc_layer": "4"}


def of_matrices(case: Case, folder: str) -> Keywords:
    """Of Kronecker factors: the linear layers of the blocks and the head, no norms."""
    names = [n for n, m in case.build().named_modules() if isinstance(m, torch.nn.Linear)]
    return {**anything(case, folder), "layers": names}


def of_features(case: Case, folder: str) -> Keywords:
    """Of KNN-Shapley: the last hidden layer."""
    return {**anything(case, folder), "layer": "3", "n_neighbors": 10}


def of_activations(case: Case, folder: str) -> Keywords:
    """Of similarity: the last hidden layer, kept in a folder."""
    return {"layers": "3", "activation_dir": folder, "batch_size": 64}


def of_margins(case: Case, folder: str) -> Keywords:
    """Of TRAK."""
    return {**anything(case, folder), "projection_dim": 512}


def by_recursion(case: Case, folder: str) -> Keywords:
    """Of LiSSA."""
    return {**anything(case, folder), "recursion_depth": DEPTH}


METHODS: Mapping[str, Callable[[Case, str], Keywords]] = {
    "GradDot": anything,
    "GradCos": anything,
    "TracInCPFast": with_last_layer,
    "TracInCPFastRandProj": with_last_layer,
    "DataInf": anything,
    "KFACInfluenceFunction": of_matrices,
    "EKFACInfluenceFunction": of_matrices,
    "CGInfluenceFunction": anything,
    "LiSSAInfluenceFunction": by_recursion,
    "NystromInfluenceFunction": anything,
    "TracInCPRandProj": of_matrices,
    "LoGra": of_matrices,
    "GraSS": of_matrices,
    "FactGraSS": of_matrices,
    "TRAK": of_margins,
    "RepresenterPointSelection": with_last_layer,
    "KNNShapley": of_features,
    "SimilarityInfluence": of_activations,
}
# too long for the GPT, or of classes only
MLP_ONLY = [
    name
    for name, keywords in METHODS.items()
    if keywords in (with_last_layer, of_features, of_activations, by_recursion)
] + ["CGInfluenceFunction", "NystromInfluenceFunction"]
BY_VECTOR = ["CGInfluenceFunction", "LiSSAInfluenceFunction"]


def build(name: str, case: Case, folder: str) -> Any:
    """A method for a case."""
    model, train = case.build(), case.dataset()
    keywords = METHODS[name](case, folder)
    kind = getattr(influence_kit, name)
    if name == "SimilarityInfluence":
        return kind(model, influence_src_dataset=train, **keywords)
    return kind(model, train_dataset=train, **keywords)


def cost(name: str, case: Case) -> Cost:
    """Of a first and a next question, in this process."""
    torch.manual_seed(2)
    test = case.data(FEW_TESTS if name in BY_VECTOR else case.q)
    asked = test[0] if name == "SimilarityInfluence" else test
    with tempfile.TemporaryDirectory() as folder:
        method = build(name, case, folder)
        seconds: list[float] = []

        def twice() -> None:
            seconds.extend(timed(partial(method.influence, asked)) for _ in range(2))

        added = added_mebibytes(twice)
    size = influence_kit.GradDot(
        case.build(), case.dataset(), case.weights()[:1], loss_fn=case.loss_fn
    ).train_dataloader.batch_size
    bare = floor(case, size, True)
    # the floor runs all checkpoints of the case, a method one
    one_pass = min(timed(bare) for _ in range(PASSES)) / case.checkpoints
    return Cost(seconds[0] / one_pass, seconds[1] / one_pass, added)


def in_fresh_process(name: str, case: Case, threads: int) -> Cost:
    """The same in a process of its own, so that nothing is warm and its peak is its own."""
    request = json.dumps({"name": name, "case": case.name, "threads": threads})
    command = [sys.executable, "-m", "benchmarks.costs", "--one", request]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return Cost(*json.loads(found))


def cells(name: str, case: Case, threads: int) -> str:
    """A method's three figures for a model."""
    if case is GPT and name in MLP_ONLY:
        return " |  | "
    found = in_fresh_process(name, case, threads)
    memory = "-" if found.mebibytes is None else f"{found.mebibytes:.0f}"
    return f"{found.first:.2f} | {found.next:.2f} | {memory}"


def main() -> None:
    """Measure all methods."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--write", action="store_true", help="put the table into RESULTS.md")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    if given.one:
        wanted = json.loads(given.one)
        torch.set_num_threads(wanted["threads"])
        case = next(case for case in CASES if case.name == wanted["case"])
        print(json.dumps(cost(wanted["name"], case)))
        return
    rows = []
    for name in given.only:
        found = " | ".join(cells(name, case, given.threads) for case in (MLP, GPT))
        rows.append(f"| {name} | {found} |")
        print(rows[-1], flush=True)
    if given.write:
        head = HEAD.format(
            sizes="; ".join(f"{c.name}: {c.q} x {c.n}" for c in (MLP, GPT)),
            heads=" | ".join(f"{c.name[:3]}: first | next | added MiB" for c in (MLP, GPT)),
            rules=" --- |" * 6,
            depth=DEPTH,
            few=FEW_TESTS,
            threads=given.threads,
            machine=machine(),
        )
        write_section(head + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
