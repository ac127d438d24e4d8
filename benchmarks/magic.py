"""How well MAGIC predicts what leaving examples out of one run changes, and what it costs.

A digits MLP (64-64-32-10; 1,437 training images; SGD with learning rate 0.03, momentum 0.9, weight
decay 0.001; 20 epochs) is trained with several seeds. Each run is repeated with some examples at
weight 0 in their batches, the same seed, batches and number of steps, by a plain loop. The figure
is the Spearman correlation of the sum of the scores of what was left out with the real change of
the query's loss, over the repetitions, as a mean over 100 test images, then over the seeds.

    python -m benchmarks.magic [--masks 40] [--queries 100] [--seeds 6] [--write]
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.settings.data import Data, Sizes
from benchmarks.settings.tables import digits
from benchmarks.speed import machine, timed, write_section
from influence_kit import MAGIC, TrainingTrace
from influence_kit.evaluation.correlation import spearman

EPOCHS, SHARES = 20, (0.01, 0.05, 0.2)
HEADING = "# MAGIC"


@dataclass(frozen=True)
class Run:
    """One way to train: an activation and a batch size."""

    name: str
    activation: type[nn.Module]
    batch_size: int


RUNS = [Run("ReLU", nn.ReLU, 64), Run("tanh", nn.Tanh, 64), Run("tanh", nn.Tanh, 256)]


def network(run: Run, seed: int) -> nn.Module:
    """The network before training."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(64, 64), run.activation(), nn.Linear(64, 32), run.activation(), nn.Linear(32, 10)
    )


def batches(n: int, run: Run, seed: int) -> Iterator[Tensor]:
    """The indices of all batches, the same in every repetition of a run."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        yield from torch.randperm(n, generator=generator).split(run.batch_size)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-3)


def train(run: Run, data: Data, seed: int, weights: Tensor | None = None) -> nn.Module:
    """The network after training by a plain loop, with weights of the examples if given."""
    inputs, targets = data.train.tensors
    model = network(run, seed)
    optimizer = optimizer_of(model)
    for indices in batches(len(inputs), run, seed):
        optimizer.zero_grad()
        losses = F.cross_entropy(model(inputs[indices]), targets[indices], reduction="none")
        (losses if weights is None else losses * weights[indices]).mean().backward()
        optimizer.step()
    return model


def record(run: Run, data: Data, seed: int) -> tuple[nn.Module, TrainingTrace]:
    """The same, recorded."""
    inputs, targets = data.train.tensors
    model = network(run, seed)
    optimizer = optimizer_of(model)
    with TrainingTrace(model, optimizer) as trace:
        for indices in batches(len(inputs), run, seed):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[indices]), targets[indices]).backward()
            trace.record(indices)
            optimizer.step()
    return model, trace


def masks_of(n: int, share: float, count: int, seed: int) -> list[Tensor]:
    """The indices that are left out of each repeated run."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(n, generator=generator)[: round(share * n)] for _ in range(count)]


def query_losses(model: nn.Module, queries: Sequence[Tensor]) -> Tensor:
    with torch.no_grad():
        return F.cross_entropy(model(queries[0]), queries[1], reduction="none").double()


def agreements(
    run: Run, data: Data, seed: int, scores: Tensor, queries: Sequence[Tensor], count: int
) -> list[float]:
    """The mean correlation over the queries, by the share of what is left out."""
    n, found = len(data.train), []
    base = query_losses(train(run, data, seed), queries)
    for share in SHARES:
        predicted, real = [], []
        for left_out in masks_of(n, share, count, seed):
            weights = torch.ones(n)
            weights[left_out] = 0
            predicted.append(scores[:, left_out].sum(1).double())
            real.append(query_losses(train(run, data, seed, weights), queries) - base)
        found.append(float(spearman(torch.stack(predicted, 1), torch.stack(real, 1)).mean()))
    return found


def figures(run: Run, data: Data, queries: Sequence[Tensor], count: int, seed: int) -> list[float]:
    """Of one seed: correlations, smoothness, seconds of a training, and the cost in trainings."""
    training = min(timed(lambda: train(run, data, seed)) for _ in range(3))
    model, trace = record(run, data, seed)
    magic = MAGIC(model, data.train, trace=trace, loss_fn=nn.CrossEntropyLoss())
    scores: list[Tensor] = []
    whole = timed(lambda: scores.append(magic.influence(tuple(queries))))
    one = timed(lambda: magic.influence(tuple(part[:1] for part in queries)))
    found = agreements(run, data, seed, scores[0], queries, count)
    smooth = magic.smoothness(tuple(queries)).error
    return [*found, smooth, training, one / training, whole / training]


def row_of(run: Run, data: Data, queries: Sequence[Tensor], count: int, seeds: int) -> str:
    """One line of the table, over all seeds."""
    rows = []
    for seed in range(seeds):
        rows.append(figures(run, data, queries, count, seed))
        print(run, seed, [round(value, 3) for value in rows[-1]], file=sys.stderr)
    table = torch.tensor(rows, dtype=torch.float64)
    means, errors = table.mean(0), table.std(0) / seeds**0.5
    cells = [f"{means[i]:.3f} ± {errors[i]:.3f}" for i in range(len(SHARES))]
    smooth, training, one, whole = table.median(0).values[len(SHARES) :].tolist()
    cells += [f"{smooth:.2f}", f"{training:.2f}", f"{one:.0f}", f"{whole:.0f}"]
    return f"| {run.name}, batches of {run.batch_size} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--masks", type=int, default=40)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--write", action="store_true", help="into RESULTS.md")
    given = parser.parse_args()
    torch.set_num_threads(1)
    data = digits(None, Sizes(1437, given.queries))
    queries, m = data.test.tensors, given.queries
    lines = [row_of(run, data, queries, given.masks, given.seeds) for run in RUNS]
    shares = " | ".join(f"{share:.0%} left out" for share in SHARES)
    heads = f"| run | {shares} | smoothness (error) | training, s | one query | all queries |"
    section = "\n".join(
        [
            HEADING,
            "",
            "Written by `python -m benchmarks.magic --write`. The sum of the scores of what is",
            "left out against the real change of a loss when the run is repeated with weight 0:",
            f"mean Spearman correlation over {given.masks} repetitions, as a mean over {m} queries",
            f"and {given.seeds} runs, with its standard error over these. Then the medians of the",
            "relative error of `MAGIC.smoothness`, of the seconds of a training, and of the time",
            "of `influence` in trainings, for one query and for all. float32, one thread.",
            "",
            machine(),
            "",
            heads,
            "|" + " --- |" * (len(SHARES) + 5),
            *lines,
            "",
        ]
    )
    print(section)
    if given.write:
        write_section(section)


if __name__ == "__main__":
    main()
