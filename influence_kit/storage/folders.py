"""Tensors in a folder beside a manifest that says what they belong to.

A folder holds ``tensors.safetensors`` and ``manifest.json``; the manifest is written last, so that
a folder that has one is whole. Reading refuses a folder whose manifest describes something else.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from influence_kit.core.dtypes import as_bytes
from influence_kit.core.objects import check_path
from influence_kit.data.batches import Batch, map_tensors
from influence_kit.errors import InvalidArgumentError

TENSORS, MANIFEST = "tensors.safetensors", "manifest.json"
FORMAT = 1
LOSSES = "losses of the first examples"
# relative differences of recorded numbers that another machine's order of summation explains: of
# sums in float64, and of losses in the model's precision
CLOSE, CLOSE_LOSSES = 1e-9, 1e-4
# characters of a value that an error shows whole
SHORT = 48


def write_folder(
    folder: str | Path, tensors: Mapping[str, Tensor], description: Mapping[str, Any]
) -> None:
    """Write tensors and what they belong to; a folder written before is replaced."""
    path = check_path(folder, "folder")
    path.mkdir(parents=True, exist_ok=True)
    (path / MANIFEST).unlink(missing_ok=True)
    part = path / f"{TENSORS}.part"
    save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, part)
    part.replace(path / TENSORS)
    text = json.dumps({"format": FORMAT, **description}, indent=2)
    replace_file(path / MANIFEST, text.encode())


def replace_file(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file so that there is all of it, on the disk, or what was there before.

    Several processes may write the same file: each has a ``.part`` file of its own.
    """
    part = path.with_name(f"{path.name}.{uuid4().hex}.part")
    try:
        with part.open("xb") as file:
            for data in parts:
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            part.replace(path)
        except FileNotFoundError:
            # another builder was done, and swept away what it took for the rest of a killed one
            if not path.exists():
                raise
    finally:
        part.unlink(missing_ok=True)
    if os.name == "posix":  # the name as well; elsewhere folders cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read_folder(folder: str | Path, description: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a folder, which must belong to what is described.

    Raises:
        InvalidArgumentError: where there is no such folder, or it belongs to something else; with
            every difference.
    """
    manifest = read_manifest(check_path(folder, "folder"), "save it again")
    found = differences(manifest, {"format": FORMAT, **description})
    if found:
        raise InvalidArgumentError(
            f"{folder} was saved for something else: {'; '.join(found)}. Fit again, or use the "
            "model, data, loss and settings it was saved with"
        )
    try:
        return load_file(Path(folder) / TENSORS)
    except (OSError, SafetensorError) as error:
        raise InvalidArgumentError(
            f"{folder}/{TENSORS} cannot be read ({error}); save it again"
        ) from error


def read_manifest(folder: Path, remedy: str) -> dict[str, Any]:
    """What a folder's manifest says.

    Raises:
        InvalidArgumentError: where there is none, or it cannot be read; with the remedy.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise InvalidArgumentError(
            f"{folder} holds no {MANIFEST}, without which what is there is not whole; {remedy}"
        )
    try:
        manifest = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InvalidArgumentError(f"{path} cannot be read ({error}); {remedy}") from error
    if not isinstance(manifest, dict):
        raise InvalidArgumentError(f"{path} holds no description of what was saved; {remedy}")
    return manifest


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """The keys in which a manifest differs from what is described here, each with both values."""
    expected = json.loads(json.dumps(here))
    found = []
    for key in sorted(there.keys() | expected.keys()):
        pair, close = (there.get(key), expected.get(key)), CLOSE_LOSSES if key == LOSSES else CLOSE
        if not _same(*pair, close):
            found.append(f"{key}: {_difference(*pair, close)}")
    return found


def _difference(there: Any, here: Any, close: float) -> str:
    """Both values; of long lists how many entries differ, and the first that does."""
    texts = [json.dumps(value) for value in (there, here)]
    lists = isinstance(there, list) and isinstance(here, list)
    if not lists or max(map(len, texts)) <= SHORT:
        return f"{_excerpt(*texts)} there, {_excerpt(*reversed(texts))} here"
    pairs = list(zip(there, here, strict=False))
    wrong = [place for place, pair in enumerate(pairs) if not _same(*pair, close)]
    told = f"{len(wrong)} of {len(pairs)} entries differ"
    if len(there) != len(here):
        told = f"{len(there)} entries there, {len(here)} here"
    if not wrong:
        return told
    return f"{told} (number {wrong[0]}: {_difference(*pairs[wrong[0]], close)})"


def _excerpt(text: str, other: str) -> str:
    """A text, or a part of it from a little before it leaves the other."""
    if len(text) <= SHORT:
        return text
    alike = (a == b for a, b in zip(text, other, strict=False))
    start = max(0, sum(1 for _ in takewhile(bool, alike)) - SHORT // 4)
    stop = start + SHORT // 2
    return f"{'...' * (start > 0)}{text[start:stop]}{'...' * (stop < len(text))}"


def _same(left: Any, right: Any, close: float) -> bool:
    if isinstance(left, float) or isinstance(right, float):
        numbers = isinstance(left, float | int) and isinstance(right, float | int)
        if not numbers or math.isnan(left) or math.isnan(right):
            return numbers and math.isnan(left) and math.isnan(right)
        return math.isclose(left, right, rel_tol=close, abs_tol=close)
    if isinstance(left, list) and isinstance(right, list):
        pairs = zip(left, right, strict=False)
        return len(left) == len(right) and all(_same(a, b, close) for a, b in pairs)
    return bool(left == right)


def hash_of(batches: Iterable[Batch]) -> str:
    """A hash of all tensors of a data set, whatever the batches they come in."""
    hashes: dict[int, Any] = {}
    for batch in batches:
        tensors: list[Tensor] = []
        map_tensors(batch, tensors.append)
        for place, tensor in enumerate(tensors):
            own = hashes.setdefault(place, hashlib.sha256(str(tensor.dtype).encode()))
            own.update(as_bytes(tensor.cpu()).numpy())
    return hashlib.sha256(b"".join(h.digest() for h in hashes.values())).hexdigest()
