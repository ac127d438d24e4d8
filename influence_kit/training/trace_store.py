"""The steps of a training run in a folder: one safetensors file each, metadata in its header."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from influence_kit.errors import InvalidArgumentError

State = dict[str, Tensor]
SUFFIX, FINAL, METADATA = ".safetensors", "final", "facts"


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
    """Steps in files ``step-0.safetensors``, ...; a file that exists is complete."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
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
        """Delete the steps from number ``count`` on."""
        self._path(FINAL).unlink(missing_ok=True)
        while self._count > count:
            self._count -= 1
            self._path(f"step-{self._count}").unlink()

    def append(self, metadata: dict[str, Any], state: State) -> None:
        """Add a step, and forget the weights after the last one."""
        self._path(FINAL).unlink(missing_ok=True)
        self._write(f"step-{self._count}", state, metadata)
        self._count += 1

    def metadata(self, number: int) -> dict[str, Any]:
        """The settings of a step, without its tensors."""
        path = self._path(f"step-{number}")
        try:
            with safe_open(path, framework="pt") as file:
                found: dict[str, Any] = json.loads(file.metadata()[METADATA])
        except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
            raise _unreadable(path, error) from error
        return found

    def state(self, number: int) -> State:
        """The tensors of a step."""
        return self._read(f"step-{number}")

    def finish(self, state: State) -> None:
        """Store the tensors after the last step."""
        self._write(FINAL, state, {})

    def final(self) -> State | None:
        """The tensors after the last step, if they were stored."""
        return self._read(FINAL) if self._path(FINAL).is_file() else None

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}{SUFFIX}"

    def _read(self, name: str) -> State:
        try:
            return load_file(self._path(name))
        except (OSError, SafetensorError) as error:
            raise _unreadable(self._path(name), error) from error

    def _write(self, name: str, state: State, metadata: dict[str, Any]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        part = self._folder / f"{name}.part"
        # safetensors refuses tensors that share memory
        tensors = {key: value.contiguous().clone() for key, value in state.items()}
        save_file(tensors, part, metadata={METADATA: json.dumps(metadata)})
        part.replace(self._path(name))


def _unreadable(path: Path, error: Exception) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"'{path}' cannot be read as a step of a trace ({error}); record the trace again, or "
        "continue before that step with `resume_at`"
    )
