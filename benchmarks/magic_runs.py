"""How well MAGIC predicts models trained on other halves of the data, with other seeds.

One run's derivative is that of its seed; a model trained again draws other batches. The mean over
runs has less of that noise. The setting is `digits-mlp` of `make quality` (its linear datamodeling
score, and its models on halves, which are trained where the folder lacks them); the runs have seeds
of their own, on all training images or each on another random half, where an image's score is its
mean over the runs that saw it.

    python -m benchmarks.magic_runs --out FOLDER [--runs 30] [--write]
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.magic import RUNS, batches, network, optimizer_of
from benchmarks.quality.studies import score_studies
from benchmarks.settings.catalog import SETTINGS
from benchmarks.settings.data import Data
from benchmarks.settings.run import truth
from benchmarks.settings.workplace import Workplace
from benchmarks.speed import machine, write_section
from influence_kit import MAGIC, TrainingTrace
from influence_kit.evaluation import half_subsets, linear_datamodeling_score

HEADING = "# MAGIC over several runs"
SEEDS = 5000  # other seeds than those of the models on halves
COUNTS = (1, 3, 10, 30)
LASTS = (1, 92)  # states whose outputs are averaged: the last one, and those of 4 epochs


def scores_of(data: Data, rows: Tensor, seed: int, last: int) -> Tensor:
    """MAGIC's scores ``[m, n]`` of one run on some of the training images; 0 for the others."""
    inputs, targets = data.train.tensors
    model, loss_fn = network(RUNS[0], seed), nn.CrossEntropyLoss()
    optimizer = optimizer_of(model)
    with TrainingTrace(model, optimizer) as trace:
        for places in batches(len(rows), RUNS[0], seed):
            indices = rows[places]
            optimizer.zero_grad()
            loss_fn(model(inputs[indices]), targets[indices]).backward()
            trace.record(indices)
            optimizer.step()
    measure = SETTINGS["digits-mlp"].measurement
    magic = MAGIC(
        model, data.train, trace=trace, loss_fn=loss_fn, test_output_fn=measure, last=last
    )
    return magic.influence(data.test.tensors)


def means_over_runs(scores: Sequence[Tensor], kept: Tensor) -> Tensor:
    """The mean score of each training image over the runs that saw it (``kept``, ``[runs, n]``)."""
    seen = kept.sum(0).clamp(min=1)
    total: Tensor = sum(scores, torch.zeros_like(scores[0]))
    return total / seen


def judged(scores: list[Tensor], kept: Tensor, count: int, truths: tuple[Tensor, Tensor]) -> str:
    """The score of ``count`` runs: a mean over disjoint groups of runs, and its standard error."""
    found = []
    for first in range(0, len(scores) - count + 1, count):
        some = slice(first, first + count)
        mean = means_over_runs(scores[some], kept[some])
        found.append(float(linear_datamodeling_score(mean, *truths, "margin").mean))
    error = f" ± {np.std(found, ddof=1) / len(found) ** 0.5:.3f}" if len(found) > 1 else ""
    return f"{np.mean(found):.3f}{error}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the folder of `make quality`")
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--write", action="store_true", help="into RESULTS.md")
    given = parser.parse_args()
    torch.set_num_threads(1)
    study = next(one for one in score_studies(1) if one.setting == "digits-mlp")
    data = study.load(None)
    place = Workplace(SETTINGS[study.setting], data, study.plan, given.out / study.setting)
    truths, n = truth(place), len(data.train)
    kept_by = {
        "all images": torch.ones(given.runs, n, dtype=torch.bool),
        "a random half": torch.as_tensor(half_subsets(n, given.runs, seed=SEEDS)).bool(),
    }
    counts = [count for count in COUNTS if count <= given.runs]
    lines = []
    for last, (name, kept) in itertools.product(LASTS, kept_by.items()):
        scores = []
        for run in range(given.runs):
            rows = kept[run].nonzero()[:, 0]
            scores.append(scores_of(data, rows, SEEDS + run, last).double())
            print(name, last, run, judged(scores[-1:], kept[run:], 1, truths), file=sys.stderr)
        cells = " | ".join(judged(scores, kept, count, truths) for count in counts)
        lines.append(f"| {name} | {last} | {cells} |")
    heads = " | ".join(f"{count} runs" if count > 1 else "1 run" for count in counts)
    section = "\n".join(
        [
            HEADING,
            "",
            "Written by `python -m benchmarks.magic_runs --write`. The linear datamodeling score",
            "on digits-mlp (100 halves, 10 models each; noise ceiling as in QUALITY.md) of scores",
            "averaged over runs of other seeds: the mean over disjoint groups of runs, with its",
            "standard error where there are several. What is explained is the log-odds of the",
            "label, as a mean over the last states of the run (`MAGIC(last=...)`): one, or those",
            "of 4 epochs. A run costs a training and a replay.",
            "",
            machine(),
            "",
            f"| each run trains on | `last` | {heads} |",
            "|" + " --- |" * (len(counts) + 2),
            *lines,
            "",
        ]
    )
    print(section)
    if given.write:
        write_section(section)


if __name__ == "__main__":
    main()
