"""Five kinds of folder, each written and read as users do, on models that take no time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Size, Tensor, nn
from torch.nn.utils import skip_init
from torch.utils.data import TensorDataset

from influence_kit import ExplicitInfluenceFunction, SimilarityInfluence, TrainingTrace
from influence_kit.evaluation import Retraining
from influence_kit.gradients.store import GradientStore

N, ROWS, CHUNK, WIDTH, CHECKPOINTS, STEPS = 8, 12, 2, 6, 2, 6
SUBSETS = torch.eye(6).bool()


def numbers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def net(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


DATA = TensorDataset(numbers(N, 3), torch.arange(N) % 2)
TEST = (numbers(3, 3, seed=1), torch.tensor([0, 1, 0]))


def nothing(done: int) -> None:
    """Hear that a piece of work is on disk, and do nothing about it."""


# What is called after each piece that is finished for good, with the number of pieces.
Progress = Callable[[int], None]


# Stores of gradients.


def store(folder: Path) -> GradientStore:
    columns = {"a": Size([2, 2]), "b": Size([2])}
    double = torch.float64
    return GradientStore.create_or_open(
        folder, {"model": "a hash"}, columns, ROWS, CHECKPOINTS, double, CHUNK
    )


def build_store(folder: Path, version: int = 0, progress: Progress = nothing) -> None:
    built = store(folder)
    if built.is_complete:
        return
    done = 0

    def pieces(checkpoint: int) -> Iterator[tuple[int, Tensor]]:
        nonlocal done
        rows = numbers(ROWS, WIDTH, seed=checkpoint)
        for start in range(0, ROWS, CHUNK):
            if built.wanted(checkpoint, start, start + CHUNK):
                yield start, rows[start : start + CHUNK]
            done += 1  # asked for the next piece, the store has written this one
            progress(done)

    for checkpoint in range(CHECKPOINTS):
        built.fill(checkpoint, pieces(checkpoint))
    built.finish()


def read_store(folder: Path, version: int = 0) -> list[Tensor]:
    found = GradientStore.open(folder, {"model": "a hash"})
    return [found.read(checkpoint, 0, ROWS) for checkpoint in range(CHECKPOINTS)]


# Saved fits.


def method(version: int) -> ExplicitInfluenceFunction:
    model = net(version)
    return ExplicitInfluenceFunction(
        model, DATA, [model.state_dict()], loss_fn=nn.CrossEntropyLoss(), damping=0.1
    )


def save_fit(folder: Path, version: int = 0, progress: Progress = nothing) -> None:
    method(version).save(folder)
    progress(1)


def read_fit(folder: Path, version: int = 0) -> list[Tensor]:
    return [method(version).load(folder).influence(TEST)]


# Traces of training.


def record_trace(folder: Path, version: int = 0, progress: Progress = nothing) -> None:
    there = len(TrainingTrace(folder=folder))
    model = net()
    with TrainingTrace(model, folder=folder, resume_at=there or None) as trace:
        for step in range(STEPS):
            if step >= there:
                trace.record([step], lr=0.1, epoch=step)
            progress(step + 1)
            with torch.no_grad():
                model[2].weight += 1


def read_trace(folder: Path, version: int = 0) -> list[Tensor]:
    found = TrainingTrace(folder=folder)
    facts = [torch.tensor([*step["indices"], step["epoch"]]) for step in found]
    states = [value for step in found for value in step["state_dict"].values()]
    return [*facts, *states, *found.final.values()]


# Retrained models.


def train_fn(indices: Tensor, seed: int) -> nn.Module:
    model = skip_init(nn.Linear, 2, 1)  # no random numbers are drawn
    with torch.no_grad():
        model.weight.fill_(float(indices.sum()) + seed)
        model.bias.zero_()
    return model


def measure(model: nn.Module) -> Tensor:
    return model.weight[0]


def not_trained(indices: Tensor, seed: int) -> nn.Module:
    raise AssertionError("a finished model was trained again")


def retrain(folder: Path, version: int = 0, progress: Progress = nothing, n_jobs: int = 1) -> None:
    retraining = Retraining(train_fn, folder, label="sums", n_jobs=n_jobs)
    if n_jobs > 1:
        retraining.checkpoints(SUBSETS)
        return
    for done in range(len(SUBSETS)):
        retraining.checkpoints(SUBSETS[: done + 1])
        progress(done + 1)


def read_models(folder: Path, version: int = 0) -> list[Tensor]:
    retraining = Retraining(not_trained, folder, label="sums", model=skip_init(nn.Linear, 2, 1))
    return [retraining.outputs(SUBSETS, measure)]


# Activations.


def save_activations(folder: Path, version: int = 0, progress: Progress = nothing) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about what is replaced
        similar(folder, version)
    progress(1)


def read_activations(folder: Path, version: int = 0) -> list[Tensor]:
    model = net(version)
    batches: list[int] = []
    model.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = similar(folder, version, model)
    assert sum(batches) <= 2 * len(TEST[0]) + 1, "activations were computed again"
    return found


def similar(folder: Path, version: int, model: nn.Module | None = None) -> list[Tensor]:
    similarity = SimilarityInfluence(model or net(version), ["0"], DATA, folder, batch_size=4)
    indices, values = similarity.influence(TEST[0], top_k=N)["0"]
    return [indices, values]


@dataclass(frozen=True)
class Kind:
    """How a kind of folder is written, all or what is missing, and read.

    Args:
        write: ``write(folder, version, progress)``.
        read: ``read(folder, version)``: what is read, as tensors; an error where it is not whole.
        holds: the subfolder with the files.
        replaces: whether another version may be written over the first.
    """

    write: Callable[..., None]
    read: Callable[[Path, int], list[Tensor]]
    holds: str = "."
    replaces: bool = False

    def files(self, folder: Path) -> dict[str, bytes]:
        """The contents of all files."""
        there = (folder / self.holds).resolve()
        return {path.name: path.read_bytes() for path in there.iterdir()} if there.is_dir() else {}


KINDS = {
    "gradients": Kind(build_store, read_store),
    "fit": Kind(save_fit, read_fit, replaces=True),
    "trace": Kind(record_trace, read_trace),
    "models": Kind(retrain, read_models),
    "activations": Kind(save_activations, read_activations, "src/0", replaces=True),
}
