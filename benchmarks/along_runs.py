"""``python -m benchmarks.along_runs``: methods that follow a run of SGD, and of Adam.

Prints the linear datamodeling score of methods over five checkpoints of a run, which hold the state
of the optimizer, on the sparse features of ``make quality``: 40 halves, two models each, three
target models. Two minutes for each optimizer.
"""

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import influence_kit
from benchmarks.quality.studies import CHECKPOINTS
from benchmarks.settings.catalog import SETTINGS
from benchmarks.settings.data import Data
from influence_kit.evaluation import half_subsets, linear_datamodeling_score, log_odds

EPOCHS, BATCH, HALVES, REPEATS, TARGETS = 20, 20, 40, 2, 3
OPTIMIZERS: dict[str, Any] = {
    "SGD": partial(torch.optim.SGD, lr=0.3),
    "Adam": partial(torch.optim.Adam, lr=0.003),
}
OVER_RUN = ["GradDot", "GradCos", "TracInCP", "EKFACInfluenceFunction"]
OF_OPTIMIZER = {"SGD": ["SOURCE"], "Adam": ["LESS", "LoGra", "TrackStar"]}


def train(data: Data, rows: Tensor, optimizer: str, seed: int) -> tuple[nn.Module, list[Any]]:
    """A model trained on some examples, and the checkpoints of its run."""
    torch.manual_seed(seed)
    model, saved = SETTINGS["sparse"].new_model(data).train(), []
    steps = OPTIMIZERS[optimizer](model.parameters())
    inputs, targets = data.train.tensors
    for epoch in range(1, EPOCHS + 1):
        for batch in rows[torch.randperm(len(rows))].split(BATCH):
            steps.zero_grad()
            cross_entropy(model(inputs[batch]), targets[batch]).backward()
            steps.step()
        if epoch % (EPOCHS // CHECKPOINTS) == 0:
            held = {"state_dict": model.state_dict(), "optimizer": steps.state_dict()}
            saved.append(copy.deepcopy(held | {"step": epoch * -(-len(rows) // BATCH)}))
    return model.eval(), saved


def methods_of(optimizer: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The methods with their own arguments; each over the whole run."""
    for name in [*OVER_RUN, *OF_OPTIMIZER[optimizer]]:
        yield name, {}
    if optimizer == "SGD":
        yield "SOURCE", {"segments": 1}
    if optimizer == "Adam":
        yield "LESS", {"similarity": "dot"}
        yield "TrackStar", {"optimizer": None}
        for name in ("GradDot", "GradCos", "TracInCP", "LoGra"):
            yield name, {"optimizer": "adam"}


def main() -> None:
    data = SETTINGS["sparse"].load(None)
    everything, (inputs, targets) = torch.arange(len(data.train)), data.test.tensors
    halves = half_subsets(len(everything), HALVES, seed=0)
    for optimizer in OPTIMIZERS:
        outputs = torch.zeros(HALVES, len(targets))
        for half, mask in enumerate(halves):
            rows = everything[torch.as_tensor(mask)]
            for repeat in range(REPEATS):
                model, _ = train(data, rows, optimizer, 100 + repeat)
                outputs[half] += log_odds(model(inputs).detach(), targets) / REPEATS
        runs = [train(data, everything, optimizer, seed) for seed in range(TARGETS)]
        for name, own in methods_of(optimizer):
            found = []
            for model, saved in runs:
                given = {"loss_fn": nn.CrossEntropyLoss(), **own}
                method = getattr(influence_kit, name)(model, data.train, saved, **given)
                scores = method.influence((inputs, targets))
                score = linear_datamodeling_score(scores, halves, outputs, "margin")
                found.append(float(score.mean))
            each = ", ".join(f"{value:.3f}" for value in found)
            values = " ".join(map(str, own.values()))
            print(f"{optimizer:5} {name + ' ' + values:24} {np.mean(found):.3f} ({each})")


if __name__ == "__main__":
    main()
