"""Per-example gradients on disk: written once, row by row, and read many times.

Shapes: n rows, K columns (of all parameters or layers, next to each other), C checkpoints, b rows
of a batch or chunk.

A store is a folder of chunks (``influence_kit.gradients.chunks``) and a ``manifest.json`` that
describes what they belong to. A chunk that exists is complete; one that does not must still be
computed. There is no other state: a build that was killed continues where it stopped, on any number
of ranks, and ends with the same bytes. Two builds at once do the work twice, and end with the same
bytes as well; ``storage.locks.alone_in`` keeps the second one waiting.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from influence_kit.core.distributed import is_mine
from influence_kit.core.memory import rows_within, workspace_bytes
from influence_kit.errors import InvalidArgumentError
from influence_kit.gradients.chunks import Chunk, incomplete, whole_chunks, write_chunk
from influence_kit.gradients.per_example import Gradients, from_flat
from influence_kit.gradients.store_manifest import KIND, Layout, Manifest, default_chunk_rows
from influence_kit.storage.atomic import remove_file, remove_temporaries
from influence_kit.storage.tensor_files import is_own_file


class GradientStore:
    """Gradients ``[n, K]`` of the same examples at each of C checkpoints, in a folder.

    Made by ``create_or_open`` (to build it) or ``open`` (to read it). Rows are memory-mapped, one
    chunk at a time, so a store may be larger than memory; the checksum of a chunk is checked when
    it is first read.

    Attributes:
        folder: the folder of the store.
        layout: its rows and columns, and how they are cut into chunks.

    Example:
        >>> import tempfile
        >>> import torch
        >>> columns = {"weight": torch.Size([2, 3]), "bias": torch.Size([2])}
        >>> gradients = torch.arange(40.0).view(5, 8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = GradientStore.create_or_open(
        ...         folder, {"model": "hash of the weights"}, columns, rows=5, dtype=torch.bfloat16
        ...     )
        ...     if not store.is_complete:
        ...         store.fill(0, [(0, gradients[:2]), (2, gradients[2:])])
        ...         store.finish()
        ...     train, test = store.gradients(0, 0, 5), store.gradients(0, 1, 2)
        ...     train.inner(test, total=5)
        tensor([[ 364., 1100., 1836., 2572., 3308.]])
    """

    def __init__(self, manifest: Manifest) -> None:
        self.folder, self.layout = manifest.folder, manifest.layout
        self._manifest = manifest
        self._checked: set[str] = set()
        self._mapped: tuple[str, Tensor] | None = None
        # the chunks that are not to be written, of checkpoints that are being filled
        self._skipped: dict[int, set[int]] = {}

    @classmethod
    def create_or_open(
        cls,
        folder: str | Path,
        description: Mapping[str, Any],
        columns: Mapping[str, torch.Size],
        rows: int,
        checkpoints: int = 1,
        dtype: torch.dtype = torch.float32,
        chunk_rows: int | None = None,
    ) -> GradientStore:
        """The store of a folder, created if there is none; all ranks make the same call.

        Args:
            folder: a new or empty folder, or one with a store of the same description.
            description: what the gradients belong to, in JSON types: hashes of model, checkpoints
                and data, the loss, the layers, the projection.
            columns: the shape of each name's part of a row, in the order of the row.
            rows: the number of examples.
            checkpoints: the number of checkpoints, each with its own gradients.
            dtype: the stored dtype. float16 has 3 digits for numbers from 6e-5 to 65504, bfloat16 2
                digits for all numbers.
            chunk_rows: rows per file, for a new store; best a multiple of the batch size. None for
                ``default_chunk_rows``.

        Raises:
            InvalidArgumentError: if the folder holds other files, or a store of something else; the
                message lists every difference.
        """
        if chunk_rows is None:
            width = sum(shape.numel() for shape in columns.values())
            chunk_rows = default_chunk_rows(rows, width * dtype.itemsize)
        layout = Layout(rows, checkpoints, dict(columns), dtype, chunk_rows)
        return cls(Manifest.made(Path(folder), layout, description))

    @classmethod
    def open(
        cls, folder: str | Path, description: Mapping[str, Any] | None = None
    ) -> GradientStore:
        """A complete store, to read it.

        Raises:
            InvalidArgumentError: if it is not complete, or does not match the description.
        """
        manifest = Manifest.read(Path(folder))
        if description is not None:
            manifest.check(description)
        store = cls(manifest)
        if not store.is_complete:
            raise incomplete(store.folder, store.layout)
        return store

    # Building it.

    @property
    def is_complete(self) -> bool:
        """Whether all chunks exist and ``finish`` was called."""
        return self._manifest.is_finished and not self.missing()

    def missing(self) -> list[tuple[int, int]]:
        """The missing chunks of all ranks: ``(checkpoint, chunk)``."""
        there = {path.name for path in self.folder.iterdir()}
        return [key for key in self._keys() if self.layout.file(*key) not in there]

    def wanted(self, checkpoint: int, start: int, stop: int) -> bool:
        """Whether this rank must still write any of the rows ``start`` to ``stop``."""
        skipped = self._skipped.get(checkpoint)
        chunks = (chunk for chunk, _ in self.layout.cut(start, stop))
        if skipped is not None:
            return any(chunk not in skipped for chunk in chunks)
        return any(is_mine(c) and not self._path(checkpoint, c).exists() for c in chunks)

    def fill(self, checkpoint: int, pieces: Iterable[tuple[int, Tensor]]) -> None:
        """Write this rank's missing chunks from a stream of rows.

        Args:
            checkpoint: the index of their checkpoint.
            pieces: ``(first row, rows [b, K])`` in ascending order, at least those for which
                ``wanted`` is true. Existing chunks are not written again.

        Raises:
            InvalidArgumentError: if rows of a chunk are missing, or do not fit.
            NonFiniteError: for rows that are NaN or infinite.
        """
        skipped = {
            chunk
            for chunk in range(self.layout.chunks)
            if not is_mine(chunk) or self._path(checkpoint, chunk).exists()
        }
        # read again: another process may write chunks meanwhile
        self._skipped[checkpoint] = skipped
        try:
            for chunk, values in whole_chunks(pieces, self.layout, skipped):
                write_chunk(self._path(checkpoint, chunk), values, self._manifest.identity)
        finally:
            del self._skipped[checkpoint]

    def empty(self) -> None:
        """Delete the chunks of an unfinished store."""
        if not self._manifest.is_finished:
            for key in self._keys():
                if is_own_file(self._path(*key), KIND):
                    remove_file(self._path(*key))

    def finish(self) -> None:
        """Record in the manifest that all chunks exist, with their checksums.

        Only one rank calls it, after all have written their chunks.

        Raises:
            InvalidArgumentError: if a chunk is missing or cut off.
        """
        missing = self.missing()
        if missing:
            raise InvalidArgumentError(
                f"{self.folder} lacks {len(missing)} chunks; the first is (checkpoint, chunk) "
                f"{missing[0]}; `fill` them first"
            )
        chunks = {
            self._path(*key).name: {"checkpoint": key[0], **self._file(*key).entry}
            for key in self._keys()
        }
        self._manifest.write(chunks)
        remove_temporaries(self.folder)

    # Reading it.

    def tiles(self, sample: Tensor | None = None) -> list[range]:
        """Ranges that cover all rows, each within one chunk and fitting the workspace."""
        like = self._sample(sample)
        size = self.layout.width * (like.element_size() + self.layout.dtype.itemsize)
        step = rows_within(workspace_bytes(like.device), size)
        chunks = (self.layout.rows_of(chunk) for chunk in range(self.layout.chunks))
        return [rows[at : at + step] for rows in chunks for at in range(0, len(rows), step)]

    def gradients(
        self, checkpoint: int, start: int, stop: int, sample: Tensor | None = None
    ) -> Gradients:
        """The rows as gradients, by name of the columns.

        Args:
            checkpoint: the index of their checkpoint.
            start: the first row.
            stop: the row after the last.
            sample: a tensor with the dtype and device to convert to; without one, float32 for half
                precision and the stored dtype otherwise, on the CPU.
        """
        like = self._sample(sample)
        values = self.read(checkpoint, start, stop).to(like.device).to(like.dtype)
        return from_flat(values, self.layout.columns, like)

    def read(self, checkpoint: int, start: int, stop: int) -> Tensor:
        """Rows as stored, ``[b, K]``: memory-mapped if they are in one chunk, otherwise a copy.

        Raises:
            InvalidArgumentError: if a chunk is missing, cut off or damaged.
        """
        parts = self.layout.cut(start, stop)
        if len(parts) == 1:
            return self._inside(checkpoint, *parts[0])
        for chunk, _ in parts:  # before memory is allocated for the sizes in a manifest
            self._file(checkpoint, chunk).require_size()
        values = torch.empty(stop - start, self.layout.width, dtype=self.layout.dtype)
        for chunk, rows in parts:
            values[rows.start - start : rows.stop - start] = self._inside(checkpoint, chunk, rows)
        return values

    # Private parts.

    def _keys(self) -> Iterator[tuple[int, int]]:
        return product(range(self.layout.checkpoints), range(self.layout.chunks))

    def _path(self, checkpoint: int, chunk: int) -> Path:
        return self.folder / self.layout.file(checkpoint, chunk)

    def _file(self, checkpoint: int, chunk: int) -> Chunk:
        path, rows = self._path(checkpoint, chunk), self.layout.rows_of(chunk)
        return Chunk(path, self._manifest.identity, self.layout, rows)

    def _sample(self, sample: Tensor | None) -> Tensor:
        half = self.layout.dtype.itemsize < 4
        dtype = torch.float32 if half else self.layout.dtype
        return torch.empty(0, dtype=dtype) if sample is None else sample

    def _inside(self, checkpoint: int, chunk: int, rows: range) -> Tensor:
        """Some of a chunk's rows."""
        first = self.layout.rows_of(chunk).start
        return self._chunk(checkpoint, chunk)[rows.start - first : rows.stop - first]

    def _chunk(self, checkpoint: int, chunk: int) -> Tensor:
        """The rows of a chunk; the last one that was read stays mapped."""
        name = self._path(checkpoint, chunk).name
        if self._mapped is None or self._mapped[0] != name:
            self._mapped = None  # so that there are never two of them
            file = self._file(checkpoint, chunk)
            values = file.mapped()
            if name not in self._checked:
                file.check(values)
                self._checked.add(name)
            self._mapped = name, values
        return self._mapped[1]
