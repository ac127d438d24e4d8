"""The manifest of a gradient store: its rows, columns and chunks, and what they belong to.

Shapes: n rows, K columns.

It is written when the store is created, and again, with the sizes and checksums of all chunks,
when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from influence_kit.core.memory import MIB, rows_within
from influence_kit.errors import InvalidArgumentError
from influence_kit.storage.atomic import make_folder
from influence_kit.storage.folders import MANIFEST, claim, differences
from influence_kit.storage.manifest import Manifest as FolderManifest

DTYPES = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
# one chunk is mapped at a time; writing a file takes at least a few milliseconds
CHUNK_BYTES, SMALL_CHUNK_BYTES = 64 * MIB, 4 * MIB
# small stores are cut into this many: a killed build loses little, and ranks can share them
FEWEST_CHUNKS = 32
# the most by which stored chunks may exceed the default size: a file must not decide on memory
LARGER = 16
KIND = "gradients"
CHUNK_NAME = re.compile(r"(\d{4,})-(\d{6,})\.safetensors")
REMEDY = "build the store again, in a new or empty folder"


def default_chunk_rows(rows: int, row_bytes: int, batch_size: int = 1) -> int:
    """Rows per chunk: 64 MiB, or less in a small store; a multiple of the batch size.

    So a batch of rows never belongs to two chunks.
    """
    size = min(CHUNK_BYTES, max(SMALL_CHUNK_BYTES, rows * row_bytes // FEWEST_CHUNKS))
    fitting = rows_within(size, row_bytes)
    return max(batch_size, fitting - fitting % batch_size)


@dataclass(frozen=True)
class Layout:
    """The rows and columns of a store, and how they are cut into chunks.

    Args:
        rows: the number of rows n, one per example.
        checkpoints: the number of checkpoints, each with its own rows.
        columns: the shape of each name's part of a row, in the order of the row; K in all.
        dtype: the dtype of the numbers.
        chunk_rows: rows per chunk; the last one may have fewer.
    """

    rows: int
    checkpoints: int
    columns: Mapping[str, torch.Size]
    dtype: torch.dtype
    chunk_rows: int

    def __post_init__(self) -> None:
        for name in ("rows", "checkpoints", "chunk_rows", "width"):
            value = getattr(self, name)
            if value < 1:
                raise InvalidArgumentError(f"a store needs `{name}` of at least 1; got {value}")
        if self.dtype not in DTYPES:
            known = ", ".join(str(dtype) for dtype in DTYPES)
            raise InvalidArgumentError(f"a store holds {known}; got {self.dtype}")

    @property
    def width(self) -> int:
        """The number of columns K."""
        return sum(math.prod(shape) for shape in self.columns.values())

    @property
    def chunks(self) -> int:
        """The number of chunks per checkpoint."""
        return -(-self.rows // self.chunk_rows)

    def rows_of(self, chunk: int) -> range:
        """The rows of a chunk."""
        start = chunk * self.chunk_rows
        return range(start, min(start + self.chunk_rows, self.rows))

    def cut(self, start: int, stop: int) -> list[tuple[int, range]]:
        """Rows ``start`` to ``stop`` by chunk: its number, and the rows in it."""
        if not 0 <= start <= stop <= self.rows:
            raise InvalidArgumentError(
                f"there are no rows {start} to {stop}: the store has {self.rows}"
            )
        size = self.chunk_rows
        starts = range(start - start % size, stop, size) if start < stop else ()
        return [(at // size, range(max(at, start), min(at + size, stop))) for at in starts]

    def name_at(self, column: int) -> str:
        """The name to which one of the K columns belongs."""
        ends = accumulate(math.prod(shape) for shape in self.columns.values())
        return next(name for name, end in zip(self.columns, ends, strict=True) if column < end)

    def count_of(self, names: Iterable[str]) -> int:
        """How many of the file names belong to chunks."""
        found = (CHUNK_NAME.fullmatch(name) for name in names)
        keys = [(int(match[1]), int(match[2])) for match in found if match]
        return sum(key[0] < self.checkpoints and key[1] < self.chunks for key in keys)

    def file(self, checkpoint: int, chunk: int) -> str:
        """The name of a chunk's file."""
        if not (0 <= checkpoint < self.checkpoints and 0 <= chunk < self.chunks):
            raise InvalidArgumentError(
                f"there is no chunk {chunk} of checkpoint {checkpoint}: the store has "
                f"{self.chunks} chunks of each of {self.checkpoints} checkpoints"
            )
        return f"{checkpoint:04d}-{chunk:06d}.safetensors"

    def too_large(self, wanted: Layout) -> list[str]:
        """Why chunks are too large (memory must hold one of them), in words; or nothing."""
        row = self.width * self.dtype.itemsize
        most = max(min(wanted.chunk_rows, wanted.rows) * row, CHUNK_BYTES) * LARGER
        size = min(self.chunk_rows, self.rows) * row
        return [f"chunks of {size >> 20} MiB there, at most {most >> 20} MiB"] * (size > most)

    def described(self) -> dict[str, Any]:
        """The entries that must match, key by key: all but ``chunk_rows``."""
        found = self.manifest()
        del found["chunk_rows"]
        columns = found.pop("columns")
        return {**found, **{f"column {name}": span for name, span in columns.items()}}

    def manifest(self) -> dict[str, Any]:
        """The layout in JSON types; the columns of a name are ``[start, stop, shape]``."""
        columns, start = {}, 0
        for name, shape in self.columns.items():
            stop = start + math.prod(shape)
            columns[name] = [start, stop, list(shape)]
            start = stop
        return {
            "rows": self.rows,
            "checkpoints": self.checkpoints,
            "dtype": str(self.dtype).removeprefix("torch."),
            "chunk_rows": self.chunk_rows,
            "columns": columns,
        }

    @classmethod
    def of_manifest(cls, manifest: Mapping[str, Any]) -> Layout:
        """The layout from the output of ``manifest``; a ``ValueError`` if it is something else."""
        try:
            columns = {
                name: torch.Size(shape) for name, (_, _, shape) in manifest["columns"].items()
            }
            numbers = [manifest[key] for key in ("rows", "checkpoints", "chunk_rows")]
            sizes = [size for shape in columns.values() for size in shape]
            if not all(type(size) is int and 0 <= size < 2**63 for size in (*numbers, *sizes)):
                raise ValueError(f"sizes must be positive; it has {numbers} and {sizes[:9]}")
            dtype = getattr(torch, manifest["dtype"])
            rows, checkpoints, chunk_rows = numbers
            return cls(rows, checkpoints, columns, dtype, chunk_rows)
        except (AttributeError, KeyError, OverflowError, RuntimeError, TypeError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class Manifest:
    """The manifest of a store, without its list of chunks.

    Args:
        folder: the folder of the store.
        description: what the gradients belong to.
        layout: the layout of rows, columns and chunks.
    """

    folder: Path
    description: Mapping[str, Any]
    layout: Layout

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a store.

        Raises:
            InvalidArgumentError: if there is none that this version can read.
        """
        found = FolderManifest.read(folder, KIND, REMEDY)
        try:
            layout = Layout.of_manifest(found.layout)
        except ValueError as error:
            raise InvalidArgumentError(
                f"{folder / MANIFEST} cannot be read ({error}); {REMEDY}"
            ) from error
        return cls(folder, found.description, layout)

    @classmethod
    def made(cls, folder: Path, layout: Layout, description: Mapping[str, Any]) -> Manifest:
        """The manifest of a store, created if there is none.

        Raises:
            InvalidArgumentError: if the folder holds something else.
        """
        # another rank may be creating the same one at this moment
        claim(folder, KIND)
        if not (folder / MANIFEST).is_file():
            make_folder(folder)
            cls(folder, description, layout).write(None)
        found = cls.read(folder)
        found.check(description, layout)
        return found

    def check(self, description: Mapping[str, Any], layout: Layout | None = None) -> None:
        """Compare with the description, and the layout if there is one.

        Raises:
            InvalidArgumentError: lists every difference.
        """
        found = differences(self.description, description)
        if layout is not None:
            found += differences(self.layout.described(), layout.described())
            found += self.layout.too_large(layout)
        if found:
            raise InvalidArgumentError(
                f"{self.folder} was built for something else: {'; '.join(found)}. Give another "
                "folder, or use the model, data, loss and settings that it was built with"
            )

    @cached_property
    def identity(self) -> str:
        """The hash that identifies the store in its chunks."""
        text = json.dumps([self.description, self.layout.manifest()])
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    @property
    def is_finished(self) -> bool:
        """Whether the manifest lists all chunks by now."""
        files = FolderManifest.read(self.folder, KIND, REMEDY).files
        return files is not None and len(files) == self.layout.checkpoints * self.layout.chunks

    def write(self, chunks: Mapping[str, Mapping[str, Any]] | None) -> None:
        """Write the manifest, with its list of chunks if all exist."""
        layout = self.layout.manifest()
        FolderManifest(KIND, self.description, layout, chunks).write(self.folder)
