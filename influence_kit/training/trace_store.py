"""The steps of a training run: in memory, or in a folder with a file for each."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from influence_kit.errors import InvalidArgumentError
from influence_kit.storage.atomic import remove_file, remove_temporaries
from influence_kit.storage.folders import claim, write_own
from influence_kit.storage.json_texts import parsed
from influence_kit.storage.locks import alone_in
from influence_kit.storage.manifest import Manifest
from influence_kit.storage.tensor_files import (
    SUFFIX,
    PackedTensors,
    TensorFile,
    UnreadableFileError,
    is_own_file,
)

State = dict[str, Tensor]
KIND, FINAL, METADATA, COUNT = "trace", "final", "facts", "steps"


class TraceInMemory:
    """Steps in memory: the metadata and tensors of each."""

    def __init__(self) -> None:
        self._steps: list[tuple[dict[str, Any], State]] = []
        self._final: State | None = None

    def __len__(self) -> int:
        return len(self._steps)

    def append(self, metadata: dict[str, Any], state: State) -> None:
        """Add a step, and forget the weights after the last one."""
        self._steps.append((metadata, state))
        self._final = None

    def metadata(self, number: int) -> dict[str, Any]:
        """The settings of a step, without its tensors."""
        return self._steps[number][0]

    def state(self, number: int) -> State:
        """The tensors of a step."""
        return self._steps[number][1]

    def finish(self, state: State) -> None:
        """Store the tensors after the last step."""
        self._final = state

    def final(self) -> State | None:
        """The tensors after the last step, if they were stored."""
        return self._final


class TraceInFolder:
    """The same in files ``step-0.safetensors``, ...; a file that exists is complete.

    A ``manifest.json`` identifies the folder as that of a trace.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._checked: set[str] = set()
        claim(folder, KIND)
        names = (path.stem.removeprefix("step-") for path in folder.glob(f"step-*{SUFFIX}"))
        numbers = sorted(int(name) for name in names if name.isdecimal())
        missing = sorted(set(range(len(numbers))) - set(numbers))
        if missing:
            raise InvalidArgumentError(
                f"the trace in {folder} lacks step {missing[0]}; it has {len(numbers)} steps, the "
                f"last of them {numbers[-1]}"
            )
        self._count = len(numbers)

    def __len__(self) -> int:
        return self._count

    def shorten(self, count: int) -> None:
        """Remove the steps from number ``count`` on."""
        with alone_in(self._folder):
            self._remove(FINAL)
            while self._count > count:
                self._remove(f"step-{self._count - 1}")
                self._count -= 1

    def append(self, metadata: dict[str, Any], state: State) -> None:
        """Add a step, and forget the weights after the last one."""
        name = f"step-{self._count}"
        with alone_in(self._folder):
            claim(self._folder, KIND)
            if self._path(name).exists():
                raise InvalidArgumentError(
                    f"'{self._path(name)}' is there already: another run records in that folder, "
                    "too; give each a folder of its own, or go on with `resume_at`"
                )
            Manifest(KIND, {}).write(self._folder)
            self._write(name, state, {METADATA: json.dumps(metadata)})
            self._remove(FINAL)
        self._count += 1

    def metadata(self, number: int) -> dict[str, Any]:
        """The settings of a step, without its tensors."""
        path = self._path(f"step-{number}")
        file = self._file(path)
        try:
            found = parsed(file.facts[METADATA])
            if not isinstance(found, dict):
                raise ValueError("its settings are not an object")
        except (KeyError, ValueError) as error:
            raise _unreadable(path, error) from error
        return found

    def state(self, number: int) -> State:
        """The tensors of a step."""
        return self._read(f"step-{number}")

    def finish(self, state: State) -> None:
        """Store the tensors after the last step."""
        with alone_in(self._folder):
            claim(self._folder, KIND)
            Manifest(KIND, {}).write(self._folder)
            self._write(FINAL, state, {COUNT: str(self._count)})
            remove_temporaries(self._folder)

    def final(self) -> State | None:
        """The tensors after the last step, if they were stored."""
        path = self._path(FINAL)
        if not path.exists():
            return None
        count = self._number(path)
        if count > self._count:
            raise InvalidArgumentError(
                f"the trace in {self._folder} lacks step {self._count}: it was finished after "
                f"{count} steps; record it again in a new folder, or go on with `resume_at`"
            )
        # a run that went on, and was killed before it had removed what was final
        return self._read(FINAL) if count == self._count else None

    def _number(self, path: Path) -> int:
        """The number of steps after which the trace was finished, from its last file."""
        try:
            return int(self._file(path).facts[COUNT])
        except (KeyError, ValueError) as error:
            raise _unreadable(path, error) from error

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}{SUFFIX}"

    def _file(self, path: Path) -> TensorFile:
        try:
            file = TensorFile.open(path)
            if not file.is_named(KIND):
                raise UnreadableFileError("it is another file")
        except UnreadableFileError as error:
            raise _unreadable(path, error) from error
        return file

    def _read(self, name: str) -> State:
        """The tensors of a file, compared with their checksum the first time."""
        path = self._path(name)
        file = self._file(path)
        try:
            state = file.mapped()
            if name not in self._checked:
                file.check(state)
                self._checked.add(name)
        except UnreadableFileError as error:
            raise _unreadable(path, error) from error
        return state

    def _write(self, name: str, state: State, facts: dict[str, str]) -> None:
        self._checked.discard(name)
        write_own(self._path(name), PackedTensors.of(state), KIND, facts)

    def _remove(self, name: str) -> None:
        """Remove a file, if the trace has written it."""
        self._checked.discard(name)
        path = self._path(name)
        if path.exists() and not is_own_file(path, KIND):
            raise InvalidArgumentError(
                f"'{path}' is damaged, or influence_kit did not write it, and is not removed: move "
                "or delete it, then go on"
            )
        remove_file(path)


def _unreadable(path: Path, error: Exception) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"'{path}' cannot be read as a step of a trace ({error}); record the trace again, or "
        "continue before that step with `resume_at`"
    )
