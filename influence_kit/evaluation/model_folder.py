"""Retrained models on disk: one safetensors file each, beside a manifest of what they belong to.

A file has its final name only when it is whole, so that a run may be killed at any moment.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from influence_kit.errors import InvalidArgumentError
from influence_kit.storage.atomic import make_folder, remove_temporaries
from influence_kit.storage.folders import MANIFEST, claim, write_own
from influence_kit.storage.locks import alone_in
from influence_kit.storage.manifest import Manifest
from influence_kit.storage.tensor_files import (
    SUFFIX,
    PackedTensors,
    TensorFile,
    UnreadableFileError,
)

KIND, REMEDY = "models", "use another folder"


@dataclass(frozen=True, eq=False)
class Job:
    """One model to train.

    Attributes:
        indices: the indices of its training examples, ascending, int64.
        seed: what its training function is given.
        subset: a hash of the examples.
    """

    indices: Tensor
    seed: int
    subset: str

    @classmethod
    def of(cls, mask: Tensor, seed: int) -> "Job":
        """The job of a subset given as a mask, bool ``[n]``."""
        digest = hashlib.sha256(np.packbits(mask.numpy()).tobytes()).hexdigest()
        return cls(torch.nonzero(mask).flatten(), int(seed), digest[:32])

    @property
    def name(self) -> str:
        """What no other job of the same training set is called."""
        return f"{self.subset}-seed{self.seed}"

    def __str__(self) -> str:
        return f"the model of {len(self.indices)} examples and seed {self.seed} ('{self.name}')"


class ModelFolder:
    """A folder of the models of one training function on subsets of one training set.

    Args:
        path: the folder; made where it does not exist.
        description: what the models belong to, as JSON has it.

    Raises:
        InvalidArgumentError: if the folder belongs to something else; the message lists the
            differences.
    """

    def __init__(self, path: str | Path, description: Mapping[str, Any]) -> None:
        self._path = Path(path)
        if self._path.exists() and not self._path.is_dir():
            raise InvalidArgumentError(f"'{path}' is a file; pass a folder to keep models in")
        wanted = json.loads(json.dumps(description))
        claim(self._path, KIND)
        if (self._path / MANIFEST).is_file():
            self._check(Manifest.read(self._path, KIND, REMEDY).description, wanted)
        else:
            make_folder(self._path)
            Manifest(KIND, wanted).write(self._path)

    def file(self, job: Job) -> Path:
        """Where the model of a job is, or would be."""
        return self._path / f"{job.name}{SUFFIX}"

    def has(self, job: Job) -> bool:
        """Whether a job is finished."""
        return self.file(job).is_file()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Inside, no other run trains models into the folder: a second one waits, and reads."""
        with alone_in(self._path):
            remove_temporaries(self._path)
            yield

    def write(self, job: Job, model: nn.Module) -> None:
        """Keep a finished model."""
        state = model.state_dict()
        other = [name for name, value in state.items() if not isinstance(value, Tensor)]
        if other:
            raise InvalidArgumentError(
                f"the state dict of a {type(model).__name__} holds '{other[0]}', which is no "
                "tensor; only tensors are kept on disk: train without a folder"
            )
        facts = {"subset": job.subset, "seed": str(job.seed), "examples": str(len(job.indices))}
        write_own(self.file(job), PackedTensors.of(state), KIND, facts)

    def read(self, job: Job, model: nn.Module) -> nn.Module:
        """Put the weights of a finished model into ``model``."""
        path = self.file(job)
        try:
            file = TensorFile.open(path)
            if not file.is_named(KIND):
                raise UnreadableFileError("it is another file")
            state = file.tensors()
        except UnreadableFileError as error:
            raise InvalidArgumentError(
                f"{job} cannot be read from {path} ({error}); remove the file to train it again"
            ) from error
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise InvalidArgumentError(
                f"{job} does not fit the `model` it is loaded into, a {type(model).__name__}: "
                f"{error}"
            ) from error
        return model

    def _check(self, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        keys = sorted(found.keys() | wanted.keys())
        differences = [
            f"{key}: {json.dumps(found.get(key))} there, {json.dumps(wanted.get(key))} here"
            for key in keys
            if found.get(key) != wanted.get(key)
        ]
        if differences:
            raise InvalidArgumentError(
                f"the models in {self._path} were trained otherwise: {'; '.join(differences)}. Use "
                "another folder; or, where the training is the same, give it the same `label`"
            )
