"""The rows of a gradient store in chunks, and a chunk as a file.

Shapes: K columns, b rows of a batch or chunk.

A chunk is a safetensors file with one tensor, ``gradients`` ``[b, K]``. Its header holds the store
and the file name that it belongs to, and the CRC-32 of its numbers. Its bytes depend on nothing
else: not on the run, the rank or the number of interruptions.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from influence_kit.errors import InvalidArgumentError, NonFiniteError
from influence_kit.gradients.store_manifest import DTYPES, KIND, Layout
from influence_kit.storage.checksums import CRC32
from influence_kit.storage.folders import write_own
from influence_kit.storage.locks import is_locked
from influence_kit.storage.tensor_files import PackedTensors, TensorFile, UnreadableFileError

TENSOR = "gradients"
# the relative loss that causes a warning: three times that of rounding in float16's normal range
LOST = 1e-3


def whole_chunks(
    pieces: Iterable[tuple[int, Tensor]], layout: Layout, skip: Collection[int]
) -> Iterator[tuple[int, Tensor]]:
    """The chunks that pieces add up to, with their rows ``[b, K]`` in the stored dtype.

    Args:
        pieces: ``(first row, rows [b, K])``, in ascending order.
        layout: defines which rows belong to which chunk.
        skip: the chunks whose rows are dropped.

    Raises:
        InvalidArgumentError: if rows of a chunk are out of order or missing, or do not fit.
        NonFiniteError: for rows that are NaN or infinite.
    """
    chunk: Tensor | None = None
    due, got = 0, "no more"
    for number, first, values in _cut(pieces, layout, skip):
        rows = layout.rows_of(number)
        if chunk is None:
            due = rows.start
            chunk = torch.empty(len(rows), layout.width, dtype=layout.dtype)
        if first != due:
            got = str(first)
            break
        due = first + len(values)
        chunk[first - rows.start : due - rows.start] = narrowed(values, layout, first)
        if due == rows.stop:
            yield number, chunk
            chunk = None
    if chunk is not None:
        raise InvalidArgumentError(
            f"rows out of order (expected {due}, got {got}): pass all rows of the chunks that are "
            "missing, in ascending order"
        )


def _cut(
    pieces: Iterable[tuple[int, Tensor]], layout: Layout, skip: Collection[int]
) -> Iterator[tuple[int, int, Tensor]]:
    """Pieces cut at the borders of chunks: ``(chunk, first row, rows)``."""
    for start, values in pieces:
        if values.dim() != 2 or values.shape[1] != layout.width:
            got = list(values.shape)
            raise InvalidArgumentError(f"rows must be [b, {layout.width}]; got {got}")
        for chunk, rows in layout.cut(start, start + len(values)):
            if chunk not in skip:
                yield chunk, rows.start, values[rows.start - start : rows.stop - start]


def narrowed(values: Tensor, layout: Layout, first: int) -> Tensor:
    """Rows ``[b, K]`` in the store's dtype, on the CPU; ``first`` is the index of the first.

    Raises:
        InvalidArgumentError: for a number that the dtype cannot hold.
        NonFiniteError: for a number that is NaN or infinite.
    """
    values = values.detach()
    stored = values.to(layout.dtype)
    # many times faster than isfinite for every number
    if not all(torch.isfinite(end) for end in torch.aminmax(stored)):
        row, column = (~torch.isfinite(stored)).nonzero()[0].tolist()
        _refuse(float(values[row, column]), first + row, layout.name_at(column), layout.dtype)
    if layout.dtype == torch.float16:
        _warn_of_small(values, stored)
    return stored.cpu()


def _refuse(value: float, row: int, name: str, dtype: torch.dtype) -> None:
    """Refuse a number that is infinite in the stored dtype."""
    if not math.isfinite(value):
        raise NonFiniteError(
            f"the gradient of example {row} at '{name}' is NaN or infinite; check that example "
            "and its loss"
        )
    largest = torch.finfo(dtype).max
    wider = [str(other) for other in DTYPES if torch.finfo(other).max > largest]
    raise InvalidArgumentError(
        f"the gradient of example {row} at '{name}' holds {value:g}, but the largest number of "
        f"{dtype} is {largest:g}; store {' or '.join(wider)}"
    )


def _warn_of_small(values: Tensor, stored: Tensor) -> None:
    """Warn if numbers are too small for float16, so that too much of them is lost."""
    lost = torch.linalg.vector_norm(values - stored.to(values.dtype), dtype=torch.float64)
    if lost > LOST * torch.linalg.vector_norm(values, dtype=torch.float64):
        warnings.warn(
            f"gradients lose more than {LOST:.1%} in torch.float16, which cannot hold their small "
            "numbers; store torch.bfloat16 or torch.float32",
            stacklevel=5,
        )


def write_chunk(path: Path, values: Tensor, store: str) -> None:
    """Write the rows ``[b, K]`` of a chunk of a store, all or nothing."""
    write_own(path, PackedTensors.of({TENSOR: values}, CRC32), KIND, {"store": store})


@dataclass(frozen=True)
class Chunk:
    """A chunk of a store on disk.

    Args:
        path: its file.
        store: the identity of the store.
        layout: of the store.
        rows: those that the chunk has.
    """

    path: Path
    store: str
    layout: Layout
    rows: range

    @property
    def file(self) -> TensorFile:
        """The file, whose header is in order.

        Raises:
            InvalidArgumentError: if it is missing, damaged, or another chunk.
        """
        if not self.path.exists():
            raise InvalidArgumentError(
                f"{self.path} is missing; build the store again, which writes the missing chunks"
            )
        try:
            found = TensorFile.open(self.path)
        except UnreadableFileError as error:
            raise self._unusable(f"cannot be read ({error})") from error
        if not found.is_named(KIND) or found.facts.get("store") != self.store:
            raise self._unusable(
                f"is of another store: its header is {dict(found.facts)}, its store is {self.store}"
            )
        shape, code = [len(self.rows), self.layout.width], DTYPES[self.layout.dtype]
        entry = found.entries.get(TENSOR, {})
        if (entry.get("shape"), entry.get("dtype")) != (shape, code):
            raise self._unusable(f"does not hold {TENSOR} {shape} of type {code}")
        return found

    @property
    def entry(self) -> dict[str, Any]:
        """The entry of the chunk in the manifest."""
        file = self.file
        rows = [self.rows.start, self.rows.stop]
        return {"rows": rows, "size": file.size, "checksum": file.checksum}

    def require_size(self) -> None:
        """Refuse a file that is too small for its rows."""
        least = len(self.rows) * self.layout.width * self.layout.dtype.itemsize
        if self.path.exists() and self.path.stat().st_size < least:
            raise self._unusable(f"cannot be read (it is cut off: {least} bytes or more expected)")

    def mapped(self) -> Tensor:
        """The rows ``[b, K]``, a map of the file, before they are compared with the checksum."""
        try:
            return self.file.mapped()[TENSOR]
        except UnreadableFileError as error:
            raise self._unusable(f"cannot be read ({error})") from error

    def check(self, values: Tensor) -> None:
        """Compare rows with the checksum.

        Raises:
            InvalidArgumentError: if they differ from what was written.
        """
        try:
            self.file.check({TENSOR: values})
        except UnreadableFileError as error:
            raise self._unusable(f"is damaged ({error})") from error

    def _unusable(self, what: str) -> InvalidArgumentError:
        return InvalidArgumentError(
            f"{self.path} {what}; delete that file and build the store again, which writes missing "
            "chunks"
        )


def incomplete(folder: Path, layout: Layout) -> InvalidArgumentError:
    """The error about a store that lacks chunks, or was not finished."""
    total = layout.checkpoints * layout.chunks
    there = layout.count_of(path.name for path in folder.iterdir())
    missing = f"{total - there} of {total} chunks are missing"
    if is_locked(folder):
        return InvalidArgumentError(
            f"{folder} is not complete yet: another process is building it ({missing}); open it "
            "when that is done"
        )
    return InvalidArgumentError(
        f"{folder} is not complete: {missing}, or `finish` was not called; build it again, which "
        "writes the missing chunks"
    )
