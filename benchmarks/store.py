"""Times a question to a store of gradients, and what it is made of.

The store holds 100,000 rows of 4,096 float16 numbers (819 MB) at one checkpoint; the question is
for the 10 training examples with the highest scores of each of 100 queries. Beside it stand what no
answer can do without, done alone: reading the files, changing the numbers to float32, the product
in float32; and other ways to the same answer. Parts and ways run in turn; the smallest time of the
rounds counts. Cold is after the kernel was told to forget the files.

    python -m benchmarks.store [--rounds 5] [--folder FOLDER] [--threads 1 2] [--write]
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Size

from benchmarks.speed import _peak, machine, timed, write_section
from influence_kit.core.memory import MIB
from influence_kit.gradients.per_example import Gradients, from_flat
from influence_kit.gradients.store import GradientStore
from influence_kit.scoring.reducers import KMostInfluentialResults, TopK

ROWS, WIDTH, QUERIES, K = 100_000, 4096, 100, 10
DTYPE = torch.float16
COLUMNS = {"projected": Size([WIDTH])}
BATCH = 1000


def build(folder: Path) -> GradientStore:
    """The store, which is written where it is not there."""
    store = GradientStore.create_or_open(
        folder, {"rows": "random"}, COLUMNS, ROWS, dtype=DTYPE, chunk_rows=8 * BATCH
    )
    if not store.is_complete:
        generator = torch.Generator().manual_seed(0)
        starts = range(0, ROWS, BATCH)
        store.fill(0, ((at, torch.randn(BATCH, WIDTH, generator=generator)) for at in starts))
        store.finish()
    return store


@dataclass
class Question:
    """The store, the queries, and each way to ask or part of the work as a method."""

    folder: Path

    @cached_property
    def store(self) -> GradientStore:
        return build(self.folder)

    @cached_property
    def queries(self) -> Gradients:
        values = torch.randn(QUERIES, WIDTH, generator=torch.Generator().manual_seed(1))
        return from_flat(values, COLUMNS, values)

    @cached_property
    def files(self) -> list[Path]:
        return sorted(self.folder.glob("*.safetensors"))

    # The whole question.

    def ask(
        self, tiles: list[range] | None = None, queries: int = QUERIES
    ) -> KMostInfluentialResults:
        top, asked = TopK(K, proponents=True), self.queries.rows(slice(queries))
        for rows in tiles or self.store.tiles():
            train = self.store.gradients(0, rows.start, rows.stop)
            top.update(torch.arange(rows.start, rows.stop), train.inner(asked, ROWS))
        return top.result()

    def ask_first(self) -> KMostInfluentialResults:
        """As a new process does, which compares the checksums."""
        self.store = GradientStore.open(self.folder)
        return self.ask()

    # Other ways.

    def ask_in_tiles(self, size: int) -> KMostInfluentialResults:
        chunks = map(self.store.layout.rows_of, range(self.store.layout.chunks))
        return self.ask(
            [rows[at : at + size] for rows in chunks for at in range(0, len(rows), size)]
        )

    def ask_reading_ahead(self) -> KMostInfluentialResults:
        """A thread reads the next tile, and changes it to float32, during the product."""
        top, tiles = TopK(K, proponents=True), self.store.tiles()
        with ThreadPoolExecutor(1) as reader:

            def begin(rows: range):
                return reader.submit(self.store.gradients, 0, rows.start, rows.stop)

            coming = begin(tiles[0])
            for rows, after in zip(tiles, [*tiles[1:], None], strict=True):
                train = coming.result()
                if after is not None:
                    coming = begin(after)
                top.update(torch.arange(rows.start, rows.stop), train.inner(self.queries, ROWS))
        return top.result()

    def ask_in_half(self) -> KMostInfluentialResults:
        """With torch's own product of float16."""
        top, queries = TopK(K, proponents=True), self.queries.flat().to(DTYPE)
        for rows in self.store.tiles():
            train = self.store.read(0, rows.start, rows.stop)
            top.update(torch.arange(rows.start, rows.stop), (train @ queries.T).T.float())
        return top.result()

    # Parts of the work, alone.

    def read(self) -> None:
        buffer = bytearray(16 * MIB)
        for path in self.files:
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    def compare_checksums(self) -> None:
        for chunk in range(self.store.layout.chunks):
            rows = self.store.layout.rows_of(chunk)
            zlib.crc32(self.store.read(0, rows.start, rows.stop).view(torch.uint8).numpy())

    def convert(self) -> None:
        for rows in self.store.tiles():
            self.store.gradients(0, rows.start, rows.stop)

    def multiply(self) -> None:
        tiles = self.store.tiles()
        train = self.store.gradients(0, tiles[0].start, tiles[0].stop)
        for rows in tiles:
            train.rows(slice(len(rows))).inner(self.queries, ROWS)

    def forget(self) -> None:
        """Have the next reading come from the disk."""
        for path in self.files:
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def parts(question: Question) -> dict[str, Callable[[], object]]:
    """What is timed, by name; ``cold`` ones after the files are forgotten."""
    return {
        "reading the files, cold": question.read,
        "reading the files": question.read,
        "mapping the files, to float32": question.convert,
        "the product in float32": question.multiply,
        "the checksums": question.compare_checksums,
        "**the question**": question.ask,
        "**the question**, cold": question.ask,
        "**the question**, for the first time": question.ask_first,
        "the same for one query": partial(question.ask, None, 1),
        "the same for one query, cold": partial(question.ask, None, 1),
        "in tiles of 64 rows": partial(question.ask_in_tiles, 64),
        "in tiles of 256 rows": partial(question.ask_in_tiles, 256),
        "in tiles of 4096 rows": partial(question.ask_in_tiles, 4096),
        "reading ahead in a thread": question.ask_reading_ahead,
        "reading ahead in a thread, cold": question.ask_reading_ahead,
    }


def rows(question: Question, threads: int, rounds: int) -> list[str]:
    """The table's lines for a number of threads."""
    torch.set_num_threads(threads)
    size = sum(path.stat().st_size for path in question.files)
    running, best = parts(question), dict[str, float]()
    for _ in range(rounds):
        for name, run in running.items():
            if name.endswith("cold"):
                question.forget()
            best[name] = min(best.get(name, float("inf")), timed(run))
    best["by torch's product of float16"] = timed(question.ask_in_half)  # so slow that once will do
    added = added_memory(question.folder, threads)
    lines = []
    for name, seconds in best.items():
        memory = f"{added:.0f}" if name == "**the question**" and added is not None else "-"
        lines.append(
            f"| {name} | {threads} | {seconds:.2f} | {size / seconds / 1e9:.2f} | {memory} |"
        )
        print(lines[-1], flush=True)
    return lines


def added_memory(folder: Path, threads: int) -> float | None:
    """MiB by which a first question raises the peak of a fresh process, mapped files included."""
    if not sys.platform.startswith("linux"):
        return None
    command = [sys.executable, "-m", "benchmarks.store", "--threads", str(threads)]
    command += ["--folder", str(folder), "--memory"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout)


def _print_added_memory(question: Question) -> None:
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = _peak()
    question.ask_first()
    print((_peak() - before) / 2**10)


HEAD = """# Store

Written by `python -m benchmarks.store --write`. The {k} highest scores of {queries} queries, over a
store of {rows:,} x {width:,} float16 numbers ({size:.0f} MB) in {chunks} files, which was written
in {written:.0f} s (random numbers included). Above the question: what it is made of, alone. Below
it: the question for one query, which the product does not hold up, and other ways to the same
answer. Seconds are the smallest of {rounds} rounds in which all ran in
turn; GB/s is the size of the store over them. Cold: after the kernel was told to forget the files;
the others find them in memory. For the first time: as a new process asks, which compares the
checksums. Added memory is the growth of a fresh process's peak by one question, mapped files
included.

{machine}

| what | threads | seconds | GB/s | added MiB |
| --- | --- | --- | --- | --- |
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the store is kept for the next time")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--write", action="store_true", help="write the section of RESULTS.md")
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if platform.system() == "Windows":
        raise SystemExit("the kernel cannot be told to forget files here")
    with tempfile.TemporaryDirectory() as passing:
        question = Question(arguments.folder or Path(passing) / "store")
        torch.set_num_threads(arguments.threads[0])
        written = timed(lambda: question.store)
        if arguments.memory:
            _print_added_memory(question)
            return
        print(f"written or opened in {written:.1f} s")
        lines = []
        for threads in arguments.threads:
            lines += rows(question, threads, arguments.rounds)
        if arguments.write:
            head = HEAD.format(
                k=K,
                queries=QUERIES,
                rows=ROWS,
                width=WIDTH,
                size=ROWS * WIDTH * DTYPE.itemsize / 1e6,
                chunks=len(question.files),
                written=written,
                rounds=arguments.rounds,
                machine=machine(),
            )
            write_section(head + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
