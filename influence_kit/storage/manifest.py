"""The manifest of a folder: its kind of contents, what they belong to, and its files.

``manifest.json`` is written last. It contains its own checksum, and the size and checksum of each
file that it lists, so that any later change is detected.
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
# format 1 was that of version 0.1, which had checksums in stores only
FORMAT = 2
# what errors call a folder of each kind
KINDS = {
    "gradients": "a store of gradients",
    "fit": "a saved fit",
    "trace": "the trace of a training run",
    "models": "retrained models",
    "activations": "activations of a layer",
}
_START = b'{\n  "checksum": "'
# enough for a million files; limits the memory that a forged manifest takes
_LARGEST = 64 * MIB
# the names of files that the library writes
_NAME = re.compile(r"[0-9A-Za-z_-][0-9A-Za-z_.-]*")


@dataclass(frozen=True)
class Manifest:
    """The description of a folder.

    Args:
        kind: the kind of contents, a key of ``KINDS``.
        description: what they belong to: weights, data, settings.
        layout: how they are divided into files.
        files: the ``size`` in bytes and ``checksum`` of each file; None if files are added one by
            one, and identify themselves by their headers.
    """

    kind: str
    description: Mapping[str, Any]
    layout: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Mapping[str, Any]] | None = None

    def text(self) -> bytes:
        """The contents of the file."""
        values = {
            "format": FORMAT,
            "holds": self.kind,
            **({"layout": self.layout} if self.layout else {}),
            "description": self.description,
            **({} if self.files is None else {"files": self.files}),
        }
        return sealed(_START, b'",' + json.dumps(values, indent=2).encode()[1:])

    def write(self, folder: Path) -> None:
        """Write it, unless the existing one is the same."""
        path, text = folder / MANIFEST, self.text()
        if not (path.is_file() and path.stat().st_size == len(text) and _read(path) == text):
            write_file(path, text)

    @classmethod
    def read(cls, folder: Path, kind: str, remedy: str) -> Manifest:
        """Read the manifest of a folder.

        Args:
            folder: the folder.
            kind: the kind that it must have.
            remedy: what to do, the end of every error.

        Raises:
            InvalidArgumentError: if there is none of this kind and format, or it is damaged.
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
    """The values of a manifest of this format."""
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
    """Whether a value is a valid list of files: names in the folder, with sizes and checksums."""
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
