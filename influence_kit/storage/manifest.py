"""The manifest of a folder: what it holds, what that belongs to, and which files are its own.

``manifest.json`` is written last. It carries its own checksum, and the size and checksum of each
file that it lists, so that what is read is what was written.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from influence_kit.core.memory import MIB
from influence_kit.errors import InvalidArgumentError
from influence_kit.storage.atomic import write_file
from influence_kit.storage.checksums import is_sealed, sealed
from influence_kit.storage.given_files import opened
from influence_kit.storage.json_texts import parsed

MANIFEST = "manifest.json"
# 1 was that of version 0.1, which had no checksums but in stores
FORMAT = 2
# how errors speak of a folder of each kind
KINDS = {
    "gradients": "a store of gradients",
    "fit": "a saved fit",
    "trace": "the trace of a training run",
    "models": "retrained models",
    "activations": "activations of a layer",
}
_START = b'{\n  "checksum": "'
# of a million files; a forged one takes no more memory
_LARGEST = 64 * MIB
# what the library calls files
_NAME = re.compile(r"[0-9A-Za-z_-][0-9A-Za-z_.-]*")


@dataclass(frozen=True)
class Manifest:
    """What a folder says of itself.

    Args:
        kind: what it holds, a key of ``KINDS``.
        description: what that belongs to: weights, data, settings.
        layout: how it is cut into files.
        files: of each file its ``size`` in bytes and its ``checksum``; None where files come one by
            one, and carry what identifies them themselves.
    """

    kind: str
    description: Mapping[str, Any]
    layout: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Mapping[str, Any]] | None = None

    def text(self) -> bytes:
        """The file's contents."""
        values = {
            "format": FORMAT,
            "holds": self.kind,
            **({"layout": self.layout} if self.layout else {}),
            "description": self.description,
            **({} if self.files is None else {"files": self.files}),
        }
        return sealed(_START, b'",' + json.dumps(values, indent=2).encode()[1:])

    def write(self, folder: Path) -> None:
        """Write it, in place of the one before, where it says something else."""
        path, text = folder / MANIFEST, self.text()
        if not (path.is_file() and path.stat().st_size == len(text) and _read(path) == text):
            write_file(path, text)

    @classmethod
    def read(cls, folder: Path, kind: str, remedy: str) -> Manifest:
        """Read the manifest of a folder.

        Args:
            folder: where it is.
            kind: what the folder must hold.
            remedy: ends every error: what to do.

        Raises:
            InvalidArgumentError: where there is none of this kind and format, or it is damaged.
        """
        path = folder / MANIFEST
        values = _values(path, remedy)
        if values.get("holds") != kind:
            there = KINDS.get(str(values.get("holds")), "something else")
            raise InvalidArgumentError(
                f"{folder} holds {there}; expected {KINDS[kind]}: name another folder"
            )
        layout, files = values.get("layout", {}), values.get("files")
        description = values.get("description")
        if not (isinstance(description, dict) and isinstance(layout, dict) and _are_files(files)):
            raise InvalidArgumentError(f"{path} cannot be read (parts of it are missing); {remedy}")
        return cls(kind, description, layout, files)


def _values(path: Path, remedy: str) -> dict[str, Any]:
    """The values of a manifest of this format, as they were written."""
    text = _text(path, remedy)
    try:
        values = parsed(text)
    except ValueError as error:
        raise InvalidArgumentError(f"{path} cannot be read ({error}); {remedy}") from error
    if not isinstance(values, dict):
        raise InvalidArgumentError(f"{path} cannot be read (it holds no description); {remedy}")
    if "checksum" not in values and values.get("format") == 1:
        raise InvalidArgumentError(
            f"{path.parent} was written by influence_kit 0.1 (format 1), without checksums; this "
            f"version reads format {FORMAT}: {remedy}"
        )
    if not is_sealed(text, _START):
        raise InvalidArgumentError(
            f"{path} cannot be read (it is damaged, or influence_kit has not written it); {remedy}"
        )
    if values.get("format") != FORMAT:
        raise InvalidArgumentError(
            f"{path} has format {values.get('format')}; this version of influence_kit reads format "
            f"{FORMAT}: {remedy}"
        )
    return values


def _text(path: Path, remedy: str) -> bytes:
    try:
        return _read(path)
    except FileNotFoundError as error:
        raise InvalidArgumentError(
            f"incomplete folder: {path.parent} holds no {MANIFEST}, which is written last; {remedy}"
        ) from error
    except (OSError, InvalidArgumentError) as error:
        raise InvalidArgumentError(f"{path} cannot be read ({error}); {remedy}") from error


def _read(path: Path) -> bytes:
    with opened(path) as file:
        if os.fstat(file.fileno()).st_size > _LARGEST:
            raise InvalidArgumentError(f"it is larger than {_LARGEST // MIB} MiB")
        return file.read()


def _are_files(files: Any) -> bool:
    """Whether it may be a list of files: names inside the folder, with sizes and checksums."""
    return files is None or (
        isinstance(files, dict)
        and all(_NAME.fullmatch(name) for name in files)
        and all(
            isinstance(entry, dict)
            and isinstance(entry.get("size"), int)
            and isinstance(entry.get("checksum"), str)
            for entry in files.values()
        )
    )
