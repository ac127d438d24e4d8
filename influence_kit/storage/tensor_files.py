"""A file of tensors: safetensors, with a header that contains its own checksum.

The bytes depend only on the tensors, their names and the metadata, so writing again gives the same
file. The header contains the kind of folder that the file belongs to, its name there, the checksum
of its numbers, and its own, so that a flipped bit anywhere is detected, and a file of the user is
never mistaken for one of the library. Other programs read it as any safetensors file.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from influence_kit.core.arguments import shown
from influence_kit.core.dtypes import as_bytes
from influence_kit.core.memory import MIB
from influence_kit.errors import InvalidArgumentError
from influence_kit.storage.atomic import write_file
from influence_kit.storage.checksums import (
    BLANK,
    SHA256,
    checksum,
    is_checksum,
    is_sealed,
    sealed,
)
from influence_kit.storage.given_files import opened
from influence_kit.storage.json_texts import parsed

SUFFIX = ".safetensors"
_CODES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "complex64": "C64",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
DTYPES = {getattr(torch, name): code for name, code in _CODES.items() if hasattr(torch, name)}
_BY_CODE = {code: dtype for dtype, code in DTYPES.items()}
_START = b'{"__metadata__":{"checksum":"'
# numbers begin at a multiple of a cache line
_ALIGNMENT = 64
# names and metadata take far less; limits the memory that a forged length of the header takes
_LARGEST_HEADER = 64 * MIB


class UnreadableFileError(InvalidArgumentError):
    """A file that differs from what was written; the message is the reason, as a clause."""


@dataclass(frozen=True)
class PackedTensors:
    """Tensors in the layout of the file.

    Attributes:
        entries: the type, shape and range of bytes of each, as in the header.
        parts: the bytes of each.
        checksum: the checksum of all bytes.
    """

    entries: Mapping[str, Any]
    parts: list[memoryview]
    checksum: str

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], algorithm: str = SHA256) -> PackedTensors:
        """Pack tensors; those that share memory are each written in full.

        Raises:
            InvalidArgumentError: for a dtype that safetensors does not support.
        """
        for name, tensor in tensors.items():
            if tensor.dtype not in DTYPES:
                known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
                raise InvalidArgumentError(
                    f"tensor '{name}' has dtype {tensor.dtype}, which a safetensors file does not "
                    f"hold; it holds {known}: convert it first"
                )
        entries, parts, start = {}, [], 0
        # the widest first, so that each begins at a multiple of its item size
        for name in sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name)):
            tensor = tensors[name]
            parts.append(_bytes(tensor.detach().cpu()))
            stop = start + len(parts[-1])
            entries[name] = {
                "dtype": DTYPES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [start, stop],
            }
            start = stop
        return cls(entries, parts, checksum(parts, algorithm))

    def write(self, path: Path, kind: str, facts: Mapping[str, str]) -> None:
        """Write the file atomically.

        Args:
            path: its path.
            kind: the kind of folder that it belongs to.
            facts: further metadata for the header.
        """
        metadata = {"data": self.checksum, "kind": kind, "file": path.name, **facts}
        rest = '",' + _inside(metadata) + ("," if self.entries else "") + _inside(self.entries)
        size = 8 + len(_START) + len(BLANK) + len(rest.encode())
        header = sealed(_START, rest.encode() + b" " * (-size % _ALIGNMENT))
        write_file(path, len(header).to_bytes(8, "little"), header, *self.parts)


@dataclass(frozen=True)
class TensorFile:
    """A file that ``PackedTensors`` has written, with an undamaged header.

    Attributes:
        path: its path.
        facts: the metadata in the header.
        entries: the type, shape and range of bytes of each tensor.
        size: the size of the file in bytes.
        data_bytes: how many of them belong to the tensors.
    """

    path: Path
    facts: Mapping[str, str]
    entries: Mapping[str, Any]
    size: int
    data_bytes: int

    @classmethod
    def open(cls, path: Path) -> TensorFile:
        """Read the header only, in no more memory than the size of the file.

        Raises:
            UnreadableFileError: if it is another file, or damaged.
        """
        found = sealed_header(path)
        if found is None:
            raise UnreadableFileError("its header is damaged, or influence_kit has not written it")
        header, size = found
        try:
            facts, entries = _parts(header)
        except ValueError as error:
            raise UnreadableFileError(f"its header makes no sense: {error}") from error
        stop = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        expected = 8 + len(header) + stop
        if size != expected:
            raise UnreadableFileError(f"it has {size} bytes, {expected} were written")
        return cls(path, facts, entries, size, stop)

    @property
    def checksum(self) -> str:
        """The checksum of the numbers, as written."""
        return str(self.facts.get("data"))

    def is_named(self, kind: str) -> bool:
        """Whether it was written under this name, for a folder of this kind."""
        return (self.facts.get("kind"), self.facts.get("file")) == (kind, self.path.name)

    def mapped(self) -> dict[str, Tensor]:
        """The tensors, as private memory maps of the file, not yet verified by the checksum.

        Raises:
            UnreadableFileError: if the file is gone, or its header does not fit the tensors.
        """
        try:
            with opened(self.path) as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            return {name: self._tensor(data, entry) for name, entry in self.entries.items()}
        except (
            OSError,
            ValueError,
            RuntimeError,
        ) as error:  # torch, for huge shapes
            raise UnreadableFileError(str(error)) from error

    def _tensor(self, data: mmap.mmap, entry: Mapping[str, Any]) -> Tensor:
        dtype, shape = _BY_CODE[entry["dtype"]], entry["shape"]
        start, stop = entry["data_offsets"]
        count = math.prod(shape)
        if stop - start != count * dtype.itemsize:
            raise ValueError(f"{stop - start} bytes do not hold {shape} of {dtype}")
        if not count:
            return torch.empty(shape, dtype=dtype)
        start += self.size - self.data_bytes
        return torch.frombuffer(data, dtype=dtype, count=count, offset=start).view(shape)

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Verify the bytes of all tensors by the checksum.

        Raises:
            UnreadableFileError: if they differ from those that were written.
        """
        names = sorted(self.entries, key=lambda name: self.entries[name]["data_offsets"])
        if not is_checksum((_bytes(tensors[name]) for name in names), self.checksum):
            raise UnreadableFileError("it is damaged: its numbers are not those of its checksum")

    def tensors(self) -> dict[str, Tensor]:
        """The tensors, verified.

        Raises:
            UnreadableFileError: if they are damaged.
        """
        found = self.mapped()
        self.check(found)
        return found


def sealed_header(path: Path) -> tuple[bytes, int] | None:
    """The header of a file of the library, and the file's size; None for any other file."""
    try:
        with opened(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(size - 8, _LARGEST_HEADER):
                return None
            header = file.read(length)
    except OSError as error:
        raise UnreadableFileError(str(error)) from error
    except InvalidArgumentError:  # a FIFO, a folder
        return None
    return (header, size) if is_sealed(header, _START) else None


def _parts(header: bytes) -> tuple[dict[str, str], dict[str, Any]]:
    """The metadata and the entries of a header; a ``ValueError`` if they are damaged."""
    entries = parsed(header)
    facts = entries.pop("__metadata__", None) if isinstance(entries, dict) else None
    if not isinstance(facts, dict) or not all(isinstance(text, str) for text in facts.values()):
        raise ValueError("its metadata are not texts")
    for name, entry in entries.items():
        if not isinstance(entry, dict) or entry.get("dtype") not in _CODES.values():
            raise ValueError(f"the type of tensor {shown(name)} is not known")
        offsets = entry.get("data_offsets")
        if not _are_sizes(entry.get("shape")) or not _are_sizes(offsets, 2):
            raise ValueError(f"the shape or range of tensor {shown(name)} is not of sizes")
    return facts, entries


def _are_sizes(values: Any, count: int | None = None) -> bool:
    """Whether a value is a list of valid sizes, of the given length if that is known."""
    if not isinstance(values, list) or count not in (None, len(values)):
        return False
    return all(type(value) is int and 0 <= value < 2**63 for value in values)


def is_own_file(path: Path, kind: str) -> bool:
    """Whether the library wrote this file, under this name, in a folder of this kind."""
    try:
        return TensorFile.open(path).is_named(kind)
    except UnreadableFileError:
        return False


def check_if_own(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Verify the tensors of a file by its checksum, if it has one.

    Raises:
        UnreadableFileError: if it is damaged.
    """
    if sealed_header(path) is not None:
        TensorFile.open(path).check(tensors)


def _inside(values: Mapping[str, Any]) -> str:
    """A JSON object without its opening brace."""
    return json.dumps(values, separators=(",", ":"))[1:]


def _bytes(tensor: Tensor) -> memoryview:
    array: Any = as_bytes(tensor).numpy()
    return memoryview(array).cast("B")
