"""The rows of a gradient store in chunks, and a chunk as a file.

Shapes: K columns, b rows of a batch or chunk.

A chunk is a safetensors file with one tensor, ``gradients`` ``[b, K]``. Its header holds the store
and the file name that it belongs to, and the CRC-32 of its numbers. Its bytes depend on nothing
else: not on the run, the rank or the number of interruptions.
"""

from __future__ import annotations

import json
import math
import warnings
import zlib
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from influence_kit.core.dtypes import as_bytes
from influence_kit.errors import InvalidArgumentError, NonFiniteError
from influence_kit.gradients.store_manifest import DTYPES, Layout
from influence_kit.storage.folders import replace_file

TENSOR, CHECKSUM = "gradients", "crc32"
# the relative loss that causes a warning: three times that of rounding in float16's normal range
LOST = 1e-3
# the numbers start at a multiple of a cache line
ALIGNMENT = 64


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
    due = 0
    for number, first, values in _cut(pieces, layout, skip):
        rows = layout.rows_of(number)
        if chunk is None:
            due = rows.start
            chunk = torch.empty(len(rows), layout.width, dtype=layout.dtype)
        if first != due:
            break
        due = first + len(values)
        chunk[first - rows.start : due - rows.start] = narrowed(values, layout, first)
        if due == rows.stop:
            yield number, chunk
            chunk = None
    if chunk is not None:
        raise InvalidArgumentError(
            f"row out of order: expected row {due}; pass all rows of the missing chunks in "
            "ascending order"
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
    """Write the rows ``[b, K]`` of a chunk of a store atomically."""
    data = _bytes(values)
    entry = {
        "dtype": DTYPES[values.dtype],
        "shape": list(values.shape),
        "data_offsets": [0, len(data)],
    }
    metadata = {"store": store, "file": path.name, CHECKSUM: _checksum(data)}
    header = json.dumps({"__metadata__": metadata, TENSOR: entry}).encode()
    header += b" " * (-(8 + len(header)) % ALIGNMENT)
    replace_file(path, len(header).to_bytes(8, "little"), header, data)


def read_chunk(path: Path, store: str) -> tuple[Tensor, str]:
    """The rows ``[b, K]`` of a chunk, memory-mapped, and the checksum in its header.

    Raises:
        InvalidArgumentError: if the file is cut off, or its header is that of another chunk.
    """
    try:
        with safe_open(path, framework="pt") as file:
            found, values = file.metadata() or {}, file.get_tensor(TENSOR)
    except FileNotFoundError as error:
        raise InvalidArgumentError(
            f"{path} is missing; build the store again, which writes the missing chunks"
        ) from error
    except (OSError, SafetensorError) as error:
        raise _unusable(path, f"cannot be read ({error})") from error
    checksum = found.get(CHECKSUM, "")
    if found != {"store": store, "file": path.name, CHECKSUM: checksum}:
        raise _unusable(path, f"is of another store: its header is {found}, its store is {store}")
    return values, checksum


def check_bytes(path: Path, values: Tensor, checksum: str) -> None:
    """Compare the rows of a chunk with its checksum.

    Raises:
        InvalidArgumentError: if they differ from what was written.
    """
    found = _checksum(_bytes(values))
    if found != checksum:
        raise _unusable(path, f"is damaged (its checksum is {found}, but {checksum} was written)")


def _bytes(values: Tensor) -> memoryview:
    array: Any = as_bytes(values).numpy()
    return memoryview(array).cast("B")


def _checksum(data: memoryview) -> str:
    return f"{zlib.crc32(data):08x}"


def _unusable(path: Path, what: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"{path} {what}; delete that file and build the store again, which writes missing chunks"
    )
