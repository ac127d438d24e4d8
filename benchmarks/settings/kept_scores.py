"""Scores of methods, kept in a folder with what they cost.

Shapes: n training and m test examples.
"""

import hashlib
import io
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import influence_kit
from influence_kit.storage.atomic import write_file


@dataclass(frozen=True)
class Variant:
    """A method with its damping.

    Attributes:
        name: its name in ``benchmarks.settings.methods``.
        over_run: over all checkpoints of the run, for a method that takes the last by itself.
        damping: a number in place of the method's default.
    """

    name: str
    over_run: bool = False
    damping: float | None = None

    def file(self, seed: int) -> str:
        """The name of the file of its scores for the target model of a seed."""
        run = "-run" if self.over_run else ""
        damping = "" if self.damping is None else f"-damping{self.damping:g}"
        return f"{self.name}{run}{damping}-target{seed}.npz"


class Scored(NamedTuple):
    """Scores and their costs, fitting included.

    Attributes:
        scores: ``[m, n]``.
        seconds: they took.
        passes: examples that went forward through the model, for each training and test example.
    """

    scores: Tensor
    seconds: float
    passes: float


class ScoreFolder:
    """Scores in files, each with what it was made by; those made by anything else are not read.

    Args:
        folder: where the files are.
        made_by: the data, the training and all else that decides them beside the code, of which a
            hash is added.
    """

    def __init__(self, folder: Path, made_by: str) -> None:
        self.folder = folder
        self.made_by = f"{made_by}; {hash_of_code()}"

    def get(self, file: str, make: Callable[[], Scored]) -> Scored:
        """What is kept in a file, or made now, and kept."""
        path = self.folder / file
        if path.exists():
            with np.load(path) as kept:
                if str(kept["made_by"]) == self.made_by:
                    scores = torch.from_numpy(kept["scores"])
                    return Scored(scores, float(kept["seconds"]), float(kept["passes"]))
        found = make()
        arrays = {"scores": found.scores.cpu().numpy(), "made_by": np.array(self.made_by)}
        written = io.BytesIO()
        np.savez(written, **arrays, seconds=found.seconds, passes=found.passes)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_file(path, written.getvalue())
        return found


@cache
def hash_of_code() -> str:
    """Of all files of ``influence_kit`` and of the settings: other code may give other scores."""
    found = hashlib.sha256(torch.__version__.encode())
    for folder in (Path(influence_kit.__file__).parent, Path(__file__).parent):
        for path in sorted(folder.rglob("*.py")):
            found.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return found.hexdigest()


def scored(
    make: Callable[[], Any], model: nn.Module, train: TensorDataset, test: TensorDataset
) -> Scored:
    """All scores of a method, and what it costs to make it, to fit it and to ask it."""
    start = time.perf_counter()
    with _counted(model) as seen:
        scores = make().influence(test.tensors)
    seconds = time.perf_counter() - start
    return Scored(scores, seconds, sum(seen) / (len(train) + len(test)))


@contextmanager
def _counted(model: nn.Module) -> Iterator[list[int]]:
    """The number of examples in each forward pass of the model."""
    seen: list[int] = []
    hook = model.register_forward_hook(lambda _, inputs, outputs: seen.append(len(outputs)))
    try:
        yield seen
    finally:
        hook.remove()
