"""What is killed: every way in which the library writes files, and what must hold afterwards."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from folders import (
    CHECKPOINTS,
    DATA,
    KINDS,
    ROWS,
    SUBSETS,
    TEST,
    Kind,
    Progress,
    net,
    nothing,
    retrain,
    store,
)
from torch import Tensor, nn

from influence_kit import GradDot
from influence_kit.storage.manifest import MANIFEST, Manifest

FOREIGN = {
    "thesis.part": b"the only copy",
    "notes.txt": b"of the user",
    "tensors-old.safetensors": b"",
}
STATES = [net(seed).state_dict() for seed in range(4)]


class ModelChangedError(AssertionError):
    """The user's model is not as it was."""


def ask_with_store(folder: Path, version: int = 0, progress: Progress = nothing) -> None:
    """A method builds a store, with four checkpoints; the model must come back as it was."""
    model = net(9)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        GradDot(model, DATA, STATES, loss_fn=nn.CrossEntropyLoss(), store=folder).influence(TEST)
    finally:
        after = model.state_dict()
        if any(not torch.equal(after[name], value) for name, value in before.items()):
            raise ModelChangedError
    progress(len(STATES))


def read_with_store(folder: Path, version: int = 0) -> list[Tensor]:
    method = GradDot(net(9), DATA, STATES, loss_fn=nn.CrossEntropyLoss(), store=folder)
    return [method.influence(TEST)]


def retrain_in_processes(folder: Path, version: int = 0, progress: Progress = nothing) -> None:
    retrain(folder, version, progress, n_jobs=2)
    progress(len(SUBSETS))


def empty_store(folder: Path, whole: Path) -> None:
    store(folder)


def empty_like(folder: Path, whole: Path) -> None:
    """A folder with the manifest of a whole one and none of its files."""
    folder.mkdir()
    shutil.copy(whole / MANIFEST, folder / MANIFEST)


def unfinished_like(folder: Path, whole: Path) -> None:
    """The same of a store, whose manifest lists no chunks before it is finished."""
    folder.mkdir()
    found = Manifest.read(whole, "gradients", "")
    Manifest("gradients", found.description, found.layout).write(folder)


@dataclass(frozen=True)
class Work:
    """One way of writing files.

    Args:
        kind: how it is written and read.
        version: what is written.
        old: what was written before, and is still whole until the new one is; None for nothing.
        start: prepares the folder, in which then stand files of the user's; None: a new one.
        pieces: how many files are finished one by one; 0 where all are replaced together.
        is_slow: takes seconds to start.
    """

    kind: Kind
    version: int = 0
    old: int | None = None
    start: Callable[[Path, Path], None] | None = None
    pieces: int = 0
    is_slow: bool = False


METHOD_STORE = Kind(ask_with_store, read_with_store)
CHUNKS = CHECKPOINTS * ROWS // 2
WORKS = {
    "store": Work(KINDS["gradients"], start=empty_store, pieces=CHUNKS),
    "store of a method": Work(METHOD_STORE, start=unfinished_like, pieces=len(STATES)),
    "save": Work(KINDS["fit"]),
    "second save": Work(KINDS["fit"], version=1, old=0),
    "trace": Work(KINDS["trace"], start=empty_like, pieces=6),
    "retraining": Work(KINDS["models"], start=empty_like, pieces=6),
    "retraining, joblib": Work(
        Kind(retrain_in_processes, KINDS["models"].read), start=empty_like, pieces=6, is_slow=True
    ),
    "activations": Work(KINDS["activations"]),
    "activations again": Work(KINDS["activations"], version=1, old=0),
}
