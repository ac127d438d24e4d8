"""Stored rows come back as they were, whatever interrupted the build, or are refused."""

import json
import math
import os
import random
import signal
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from server_processes import context
from torch import Size, Tensor

from influence_kit.core.memory import MIB, workspace_bytes
from influence_kit.errors import InvalidArgumentError, NonFiniteError
from influence_kit.gradients import store as store_module
from influence_kit.gradients.chunks import Chunk
from influence_kit.gradients.store import GradientStore
from influence_kit.gradients.store_manifest import default_chunk_rows
from influence_kit.scoring.reducers import TopK
from influence_kit.storage import atomic
from influence_kit.storage.folders import MANIFEST, write_folder
from influence_kit.storage.manifest import Manifest as FolderManifest
from influence_kit.storage.tensor_files import PackedTensors

COLUMNS = {"a.weight": Size([2, 3]), "a.bias": Size([2]), "b": Size([3])}
ROWS, CHECKPOINTS, WIDTH, CHUNK = 23, 2, 11, 5
DESCRIPTION = {"model": "0123", "layers": ["a", "b"], "loss": 0.25}


def all_rows(checkpoint: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(checkpoint)
    return torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64)


def new(folder: Path, **changed: Any) -> GradientStore:
    arguments: dict[str, Any] = {
        "description": DESCRIPTION,
        "columns": COLUMNS,
        "rows": ROWS,
        "checkpoints": CHECKPOINTS,
        "dtype": torch.float64,
        "chunk_rows": CHUNK,
    }
    return GradientStore.create_or_open(folder, **(arguments | changed))


def pieces(rows: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    return ((start, rows[start : start + size]) for start in range(0, len(rows), size))


def build(folder: Path, size: int = 3, **changed: Any) -> GradientStore:
    store = new(folder, **changed)
    for checkpoint in range(CHECKPOINTS):
        store.fill(checkpoint, pieces(all_rows(checkpoint), size))
    store.finish()
    return store


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def chunk_files(folder: Path) -> dict[str, tuple[int, int]]:
    """The finished chunks, with what changes when one is written again."""
    stats = {path.name: path.stat() for path in folder.glob("*.safetensors")}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def chunk(folder: Path, checkpoint: int = 0, number: int = 1) -> Path:
    return folder / f"{checkpoint:04d}-{number:06d}.safetensors"


# Rows come back.


@pytest.mark.parametrize("size", [1, 3, 5, 12, 23])
def test_rows_come_back_at_any_batch_size(tmp_path: Path, size: int) -> None:
    built = build(tmp_path, size)
    for store in (built, GradientStore.open(tmp_path, DESCRIPTION), new(tmp_path)):
        assert store.is_complete
        for checkpoint in range(CHECKPOINTS):
            rows = all_rows(checkpoint)
            for start in range(ROWS + 1):
                for stop in range(start, ROWS + 1, 4):
                    found = store.read(checkpoint, start, stop)
                    assert torch.equal(found, rows[start:stop]), (start, stop)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_each_dtype_comes_back_as_rounded(tmp_path: Path, dtype: torch.dtype) -> None:
    store = build(tmp_path, dtype=dtype)
    assert store.read(0, 0, ROWS).dtype == dtype
    assert torch.equal(store.read(0, 0, ROWS), all_rows().to(dtype))


def test_the_files_depend_on_the_rows_alone(tmp_path: Path) -> None:
    build(tmp_path / "a", 3)
    build(tmp_path / "b", 12)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_chunk_can_be_read_without_this_library(tmp_path: Path) -> None:
    build(tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert manifest["description"] == DESCRIPTION
    layout = manifest["layout"]
    assert (layout["rows"], layout["checkpoints"], layout["dtype"]) == (23, 2, "float64")
    assert layout["columns"] == {
        "a.weight": [0, 6, [2, 3]],
        "a.bias": [6, 8, [2]],
        "b": [8, 11, [3]],
    }
    assert len(manifest["files"]) == CHECKPOINTS * math.ceil(ROWS / CHUNK)
    for name, entry in manifest["files"].items():
        assert (tmp_path / name).stat().st_size == entry["size"]
        values = load_file(tmp_path / name)["gradients"]
        assert torch.equal(values, all_rows(entry["checkpoint"])[slice(*entry["rows"])])
        assert f"crc32:{zlib.crc32(values.numpy().tobytes()):08x}" == entry["checksum"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_rows_are_maps_of_one_file_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = build(tmp_path)

    def mapped() -> set[str]:
        lines = Path("/proc/self/maps").read_text().splitlines()
        return {line.split("/")[-1] for line in lines if str(tmp_path) in line}

    def check(chunk: Chunk, values: Tensor) -> None:  # which reads all of it
        assert mapped() == {chunk.path.name}

    monkeypatch.setattr(Chunk, "check", check)
    first, again = store.read(0, 5, 10), store.read(0, 6, 7)
    assert again.data_ptr() == first[1:].data_ptr()
    assert mapped() == {chunk(tmp_path).name}
    del first, again
    for checkpoint in range(CHECKPOINTS):
        store.gradients(checkpoint, 0, ROWS)
    assert mapped() == {chunk(tmp_path, 1, 4).name}
    before = contents(tmp_path)
    store.read(1, 20, 23).zero_()
    assert contents(tmp_path) == before


def test_rows_are_gradients_by_name(tmp_path: Path) -> None:
    store = build(tmp_path)
    train, test = store.gradients(0, 0, ROWS), store.gradients(1, 4, 7)
    assert {name: form.shape for name, form in train.forms.items()} == COLUMNS
    assert torch.equal(train.flat(), all_rows())
    expected = all_rows(1)[4:7] @ all_rows().T
    assert torch.allclose(train.inner(test, ROWS), expected, rtol=1e-13)
    groups = {"a": ["a.weight", "a.bias"], "b": ["b"]}
    by_group = train.inner_by_group(test, ROWS, groups)
    assert torch.allclose(by_group[1], all_rows(1)[4:7, 8:] @ all_rows()[:, 8:].T, rtol=1e-13)


def test_the_best_of_a_store_are_those_of_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, queries = build(tmp_path), build(tmp_path).gradients(1, 0, 4)
    monkeypatch.setattr(store_module, "workspace_bytes", lambda _: 2 * WIDTH * 16)
    top = TopK(6, proponents=True)
    for tile in store.tiles():
        train = store.gradients(0, tile.start, tile.stop)
        top.update(torch.arange(tile.start, tile.stop), train.inner(queries, ROWS))
    expected = (all_rows(1)[:4] @ all_rows().T).sort(dim=1, descending=True)
    found = top.result()
    assert torch.equal(found.indices, expected.indices[:, :6])
    assert torch.allclose(found.influence_scores, expected.values[:, :6], rtol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gradients_have_the_dtype_of_the_scores(tmp_path: Path, dtype: torch.dtype) -> None:
    store = build(tmp_path, dtype=dtype)
    single, double = store.gradients(0, 3, 9), store.gradients(0, 3, 9, torch.ones(1).double())
    assert (single.sample.dtype, double.sample.dtype) == (torch.float32, torch.float64)
    assert torch.equal(single.flat(), all_rows()[3:9].to(dtype).float())
    assert torch.equal(double.flat(), all_rows()[3:9].to(dtype).double())


def test_tiles_are_all_rows_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = build(tmp_path, dtype=torch.float16)
    assert store.tiles() == [range(at, min(at + CHUNK, ROWS)) for at in range(0, ROWS, CHUNK)]
    monkeypatch.setattr(store_module, "workspace_bytes", lambda _: 2 * WIDTH * (2 + 8))
    starts = [0, 2, 4, 5, 7, 9, 10, 12, 14, 15, 17, 19, 20, 22]
    tiles = store.tiles(torch.ones(1).double())
    assert [tile.start for tile in tiles] == starts
    assert [row for tile in tiles for row in tile] == list(range(ROWS))


def test_a_tile_fits_the_workspace() -> None:
    assert default_chunk_rows(10**6, 8192) * 8192 == 64 * MIB
    assert workspace_bytes(torch.device("cpu")) < 64 * MIB


@pytest.mark.parametrize(
    ("rows", "row_bytes", "batch_size", "expected"),
    [
        (10**6, 2**20, 1, 64),  # 64 MiB
        (10**6, 2**30, 1, 1),  # at least a row
        (10**6, 2**20, 60, 60),
        (10**6, 2**20, 100, 100),
        (1024, 2**20, 1, 32),  # a 32nd
        (1024, 2**20, 10, 30),
        (64, 2**20, 1, 4),  # 4 MiB
    ],
)
def test_a_chunk_has_whole_batches(
    rows: int, row_bytes: int, batch_size: int, expected: int
) -> None:
    assert default_chunk_rows(rows, row_bytes, batch_size) == expected


# Builds that are interrupted, shared, or repeated.


def test_what_is_there_is_not_computed_again(tmp_path: Path) -> None:
    build(tmp_path / "whole")
    store = new(tmp_path / "part")
    assert not store.is_complete
    assert store.missing() == [(c, n) for c in range(2) for n in range(5)]
    store.fill(0, pieces(all_rows()[:10], 5))
    store.fill(0, [(15, all_rows()[15:20])])
    assert store.missing() == [(0, 2), (0, 4), *((1, n) for n in range(5))]
    old = chunk_files(tmp_path / "part")
    again = new(tmp_path / "part", chunk_rows=7)
    wanted = [again.wanted(0, start, start + 3) for start in range(0, 23, 3) if start + 3 <= 23]
    assert wanted == [False, False, False, True, True, False, True]
    assert not again.wanted(0, 10, 10)
    for checkpoint in range(CHECKPOINTS):
        rows = all_rows(checkpoint)
        again.fill(
            checkpoint,
            (
                (start, piece)
                for start, piece in pieces(rows, 3)
                if again.wanted(checkpoint, start, start + len(piece))
            ),
        )
    again.finish()
    assert contents(tmp_path / "part") == contents(tmp_path / "whole")
    assert old.items() <= chunk_files(tmp_path / "part").items()


def test_a_chunk_that_was_deleted_is_written_again(tmp_path: Path) -> None:
    build(tmp_path)
    before = contents(tmp_path)
    chunk(tmp_path, 1, 2).unlink()
    with pytest.raises(InvalidArgumentError, match="1 of 10 chunks are missing"):
        GradientStore.open(tmp_path)
    store = new(tmp_path)
    assert store.missing() == [(1, 2)]
    store.fill(1, pieces(all_rows(1), 4))
    store.finish()
    assert contents(tmp_path) == before


def test_a_complete_store_is_left_alone(tmp_path: Path) -> None:
    build(tmp_path)
    before = chunk_files(tmp_path), (tmp_path / MANIFEST).stat()
    build(tmp_path)
    assert (chunk_files(tmp_path), (tmp_path / MANIFEST).stat()) == before


@pytest.mark.parametrize("step", ["os.fsync", "Path.replace"])
def test_a_write_that_fails_leaves_no_chunk(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = new(tmp_path)
    before = contents(tmp_path)

    def fail(*_: Any) -> None:
        raise OSError("no space left")

    owner, _, name = step.partition(".")
    with monkeypatch.context() as patch:
        patch.setattr(getattr(atomic, owner), name, fail)
        with pytest.raises(OSError, match="no space left"):
            store.fill(0, pieces(all_rows(), 3))
    assert contents(tmp_path) == before


def test_what_killed_writers_left_is_cleared_away(tmp_path: Path) -> None:
    build(tmp_path / "clean")
    store = new(tmp_path / "killed")
    (tmp_path / "killed" / f".influence_kit-{'01' * 16}.part").write_bytes(b"half of a chunk")
    assert len(store.missing()) == 10
    build(tmp_path / "killed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "clean")


def test_ranks_write_chunks_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path / "alone")
    for rank in range(2):
        monkeypatch.setattr(store_module, "is_mine", lambda number, rank=rank: number % 2 == rank)
        store = new(tmp_path / "ranks")
        assert [store.wanted(0, at, at + 2) for at in (0, 4, 5, 20)] == (
            [True, True, False, True] if rank == 0 else [False, True, True, False]
        )
        for checkpoint in range(CHECKPOINTS):
            store.fill(checkpoint, pieces(all_rows(checkpoint), 4))
        assert len(store.missing()) == (4 if rank == 0 else 0)
    store.finish()
    assert contents(tmp_path / "ranks") == contents(tmp_path / "alone")


def _build_slowly(folder: str, started: Any, pause: float) -> None:
    """In a process of its own; ``started`` is set when the first row is computed."""
    sync = os.fsync

    def slow_sync(file: int) -> None:  # a kill often finds a chunk half written
        time.sleep(pause)
        sync(file)

    def slowly(store: GradientStore, checkpoint: int) -> Iterator[tuple[int, Tensor]]:
        for start, piece in pieces(all_rows(checkpoint), 3):
            if store.wanted(checkpoint, start, start + len(piece)):
                started.set()
                time.sleep(pause)
                yield start, piece

    store = new(Path(folder), chunk_rows=2)
    os.fsync = slow_sync
    for checkpoint in range(CHECKPOINTS):
        store.fill(checkpoint, slowly(store, checkpoint))
    started.set()
    store.finish()


def _start(folder: Path, pause: float) -> Any:
    started = context().Event()
    process = context().Process(target=_build_slowly, args=(str(folder), started, pause))
    process.start()
    assert started.wait(60)
    return process


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGKILL")
def test_ten_kills_lose_no_chunk_and_change_no_byte(tmp_path: Path) -> None:
    """At random moments, most of which fall into the writing of a chunk."""
    build(tmp_path / "whole", chunk_rows=2)
    whole, folder = contents(tmp_path / "whole"), tmp_path / "killed"
    moments = random.Random(0)
    known: dict[str, tuple[int, int]] = {}
    for _ in range(10):
        process = _start(folder, pause=0.03)
        time.sleep(moments.uniform(0, 0.18))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        there = chunk_files(folder)
        assert known.items() <= there.items(), "a chunk was lost or written again"
        assert all((folder / name).read_bytes() == whole[name] for name in there)
        known = there
    process = _start(folder, pause=0.0)
    process.join(60)
    assert process.exitcode == 0
    assert contents(folder) == whole


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="has no forkserver")
def test_two_builds_of_one_folder_do_no_harm(tmp_path: Path) -> None:
    build(tmp_path / "whole", chunk_rows=2)
    processes = [_start(tmp_path / "twice", pause=0.005) for _ in range(2)]
    for process in processes:
        process.join(60)
    build(tmp_path / "twice", chunk_rows=2)
    assert contents(tmp_path / "twice") == contents(tmp_path / "whole")


# Stores that are refused.


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"description": DESCRIPTION | {"model": "4567"}}, 'model: "0123" there, "4567" here'),
        ({"description": DESCRIPTION | {"seed": 1}}, "seed: null there, 1 here"),
        ({"description": DESCRIPTION | {"loss": 0.26}}, "loss: 0.25 there, 0.26 here"),
        ({"rows": 24}, "rows: 23 there, 24 here"),
        ({"checkpoints": 1}, "checkpoints: 2 there, 1 here"),
        ({"dtype": torch.float16}, 'dtype: "float64" there, "float16" here'),
        (
            {"columns": {"a.weight": Size([3, 2]), "c": Size([2]), "b": Size([3])}},
            r"column a.bias: \[6, 8, \[2\]\] there, null here; column a.weight: "
            r"\[0, 6, \[2, 3\]\] there, \[0, 6, \[3, 2\]\] here; column c: null there",
        ),
        (
            {"columns": {"b": Size([3]), "a.weight": Size([2, 3]), "a.bias": Size([2])}},
            r"column b: \[8, 11, \[3\]\] there, \[0, 3, \[3\]\] here",
        ),
        ({"rows": 24, "description": {}}, "layers: .* there, null here.*; rows: 23 there"),
    ],
)
def test_another_store_is_refused_with_every_difference(
    tmp_path: Path, changed: dict[str, Any], match: str
) -> None:
    build(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(InvalidArgumentError, match=f"built for something else: .*{match}"):
        new(tmp_path, **changed)
    assert contents(tmp_path) == before


def test_opening_compares_the_description(tmp_path: Path) -> None:
    build(tmp_path)
    GradientStore.open(tmp_path, DESCRIPTION | {"loss": 0.25 * (1 + 1e-12)})
    with pytest.raises(InvalidArgumentError, match=r"loss: 0\.25 there, 0\.5 here"):
        GradientStore.open(tmp_path, DESCRIPTION | {"loss": 0.5})


def test_an_incomplete_store_is_not_asked(tmp_path: Path) -> None:
    store = new(tmp_path)
    store.fill(0, pieces(all_rows(), 3))
    with pytest.raises(InvalidArgumentError, match="5 of 10 chunks are missing"):
        GradientStore.open(tmp_path)
    with pytest.raises(InvalidArgumentError, match=r"lacks 5 chunks; the first is .* \(1, 0\)"):
        store.finish()
    with pytest.raises(InvalidArgumentError, match=r"0001-000000.* is missing; build"):
        store.read(1, 0, 2)
    store.fill(1, pieces(all_rows(1), 3))
    with pytest.raises(InvalidArgumentError, match="0 of 10 chunks are missing, or `finish` was"):
        GradientStore.open(tmp_path)
    store.finish()
    assert GradientStore.open(tmp_path).is_complete


def test_a_folder_of_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("the only copy")
    with pytest.raises(InvalidArgumentError, match=r"holds files \('thesis.txt'\)"):
        new(tmp_path)
    with pytest.raises(InvalidArgumentError, match=f"holds no {MANIFEST}"):
        GradientStore.open(tmp_path)


def test_what_a_method_saved_is_no_store(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a": torch.ones(2)}, {"method": "EKFAC"})
    match = "holds a saved fit; expected a store of gradients: name another folder"
    with pytest.raises(InvalidArgumentError, match=match):
        new(tmp_path)


@pytest.mark.parametrize(
    "changed",
    [
        {"rows": None},
        {"rows": 0},
        {"rows": 2.5},
        {"dtype": "float12"},
        {"columns": [1]},
        {"columns": {"a": 1}},
        {"columns": {"a": [0, 1, [-1]]}},
        {"columns": {"a": [0, 1, [10**30]]}},
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(tmp_path: Path, changed: dict[str, Any]) -> None:
    build(tmp_path)
    found = FolderManifest.read(tmp_path, "gradients", "")
    replace(found, layout={**found.layout, **changed}).write(tmp_path)
    with pytest.raises(InvalidArgumentError, match=f"{MANIFEST} cannot be read"):
        GradientStore.open(tmp_path)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"rows": 0}, "`rows` of at least 1; got 0"),
        ({"checkpoints": 0}, "`checkpoints` of at least 1; got 0"),
        ({"chunk_rows": 0}, "`chunk_rows` of at least 1; got 0"),
        ({"columns": {}}, "`width` of at least 1; got 0"),
        ({"columns": {}, "chunk_rows": None}, "`width` of at least 1; got 0"),
        ({"dtype": torch.int8}, "holds torch.float16, .*; got torch.int8"),
    ],
)
def test_a_store_of_nothing_is_refused(tmp_path: Path, changed: dict[str, Any], match: str) -> None:
    with pytest.raises(InvalidArgumentError, match=match):
        new(tmp_path / "new", **changed)
    assert not (tmp_path / "new").exists()


# Chunks that are refused.


def damaged(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


@pytest.mark.parametrize("size", [0, 5, 200, -1])
def test_a_chunk_that_is_cut_off_is_refused(tmp_path: Path, size: int) -> None:
    build(tmp_path)
    path = chunk(tmp_path)
    path.write_bytes(path.read_bytes()[:size])
    match = f"{path.name} cannot be read .*; delete that file and build the store again"
    with pytest.raises(InvalidArgumentError, match=match):
        GradientStore.open(tmp_path).read(0, 5, 6)
    with pytest.raises(InvalidArgumentError, match=match):
        new(tmp_path).finish()


@pytest.mark.parametrize("place", [-1, -CHUNK * WIDTH * 8])
def test_a_chunk_that_is_damaged_is_refused(tmp_path: Path, place: int) -> None:
    build(tmp_path)
    path = chunk(tmp_path)
    data = path.read_bytes()
    path.write_bytes(damaged(data, place % len(data)))
    store = GradientStore.open(tmp_path)
    for _ in range(2):
        with pytest.raises(InvalidArgumentError, match=f"{path.name} is damaged .*; delete that"):
            store.read(0, 6, 7)
    assert torch.equal(store.read(0, 10, 11), all_rows()[10:11])


def test_a_chunk_of_another_place_or_store_is_refused(tmp_path: Path) -> None:
    build(tmp_path / "a")
    build(tmp_path / "b", description=DESCRIPTION | {"model": "4567"})
    path = chunk(tmp_path / "a")
    for other in (chunk(tmp_path / "a", 1, 1), chunk(tmp_path / "b")):
        path.write_bytes(other.read_bytes())
        with pytest.raises(InvalidArgumentError, match=f"{path.name} is of another store"):
            GradientStore.open(tmp_path / "a").read(0, 5, 6)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    build(tmp_path)
    save_file({"gradients": torch.ones(2)}, chunk(tmp_path))
    with pytest.raises(InvalidArgumentError, match=r"cannot be read .*influence_kit has not writ"):
        GradientStore.open(tmp_path).read(0, 5, 6)
    PackedTensors.of({"other": torch.ones(2)}).write(chunk(tmp_path), "gradients", {})
    with pytest.raises(InvalidArgumentError, match=r"is of another store: its header is {"):
        GradientStore.open(tmp_path).read(0, 5, 6)
    identity = {"store": GradientStore.open(tmp_path)._manifest.identity}
    PackedTensors.of({"gradients": torch.ones(2)}).write(chunk(tmp_path), "gradients", identity)
    with pytest.raises(InvalidArgumentError, match=r"does not hold gradients \[5, 11\] of"):
        GradientStore.open(tmp_path).read(0, 5, 6)


# Rows that are refused.


@pytest.mark.parametrize(
    ("given", "due", "got"),
    [
        ([(1, 5)], 0, "1"),
        ([(0, 3)], 3, "no more"),
        ([(0, 3), (4, 10)], 3, "4"),
        ([(0, 4), (3, 10)], 4, "3"),
        ([(0, 3), (5, 10)], 3, "5"),
        ([(0, 7), (10, 15)], 7, "10"),
    ],
)
def test_rows_out_of_turn_are_refused(
    tmp_path: Path, given: list[tuple[int, int]], due: int, got: str
) -> None:
    store = new(tmp_path)
    with pytest.raises(InvalidArgumentError, match=f"expected {due}, got {got}"):
        store.fill(0, ((start, all_rows()[start:stop]) for start, stop in given))


def test_rows_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    store = new(tmp_path)
    with pytest.raises(InvalidArgumentError, match=r"rows must be \[b, 11\]; got \[5, 12\]"):
        store.fill(0, [(0, torch.zeros(5, 12))])
    with pytest.raises(InvalidArgumentError, match=r"rows must be \[b, 11\]; got \[11\]"):
        store.fill(0, [(0, torch.zeros(11))])
    with pytest.raises(InvalidArgumentError, match="no rows 20 to 25: the store has 23"):
        store.fill(0, [(20, torch.zeros(5, 11))])
    with pytest.raises(InvalidArgumentError, match="no chunk 0 of checkpoint 2: the store has 5"):
        store.fill(2, pieces(all_rows(), 5))
    assert len(store.missing()) == 10


def test_rows_that_are_not_there_are_refused(tmp_path: Path) -> None:
    store = build(tmp_path)
    for start, stop in ((-1, 2), (0, 24), (3, 2)):
        with pytest.raises(InvalidArgumentError, match=f"no rows {start} to {stop}"):
            store.read(0, start, stop)
    with pytest.raises(InvalidArgumentError, match="no chunk 0 of checkpoint 2"):
        store.read(2, 0, 1)


def one_number(value: float, row: int, column: int) -> Tensor:
    rows = torch.ones(ROWS, WIDTH, dtype=torch.float64)
    rows[row, column] = value
    return rows


@pytest.mark.parametrize(
    ("dtype", "value", "match"),
    [
        (torch.float16, 65520.0, "largest .* torch.float16 is 65504; store torch.bfloat16 or"),
        (torch.float16, -1e30, "example 13 at 'a.bias' holds -1e[+]30"),
        (torch.bfloat16, 3.4e38, "torch.bfloat16 is 3.38953e[+]38; store torch.float32 or"),
        (torch.float32, 1e39, "store torch.float64$"),
    ],
)
def test_a_number_that_overflows_is_refused(
    tmp_path: Path, dtype: torch.dtype, value: float, match: str
) -> None:
    store = new(tmp_path, dtype=dtype)
    with pytest.raises(InvalidArgumentError, match=match):
        store.fill(0, pieces(one_number(value, 13, 7), 4))
    assert [number for c, number in store.missing() if c == 0] == [2, 3, 4]


def test_the_largest_number_is_kept(tmp_path: Path) -> None:
    store = new(tmp_path, dtype=torch.float16)
    store.fill(0, pieces(one_number(65519.0, 13, 7), 4))
    assert float(store.read(0, 13, 14)[0, 7]) == 65504


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_is_refused(tmp_path: Path, value: float) -> None:
    store = new(tmp_path)
    with pytest.raises(NonFiniteError, match="example 22 at 'b' is NaN or infinite"):
        store.fill(0, pieces(one_number(value, 22, 10), 4))


@pytest.mark.parametrize("size", [1e-7, 1e-12, 1e-100])
def test_what_float16_loses_of_small_numbers_is_told(tmp_path: Path, size: float) -> None:
    store = new(tmp_path / "half", dtype=torch.float16)
    with pytest.warns(UserWarning, match="lose more than 0.1% .* store torch.bfloat16"):
        store.fill(0, pieces(all_rows() * size, 4))


def test_some_small_numbers_are_not_told(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    rows = all_rows()
    rows[::2] *= 1e-9
    new(tmp_path / "half", dtype=torch.float16).fill(0, pieces(rows, 23))
    new(tmp_path / "brain", dtype=torch.bfloat16).fill(0, pieces(rows * 1e-9, 23))
    assert not recwarn.list


def test_gradients_of_a_graph_are_stored(tmp_path: Path) -> None:
    store = new(tmp_path)
    store.fill(0, pieces(all_rows().requires_grad_(), 4))
    assert torch.equal(store.read(0, 0, ROWS), all_rows())
