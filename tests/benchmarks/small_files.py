"""Small files in the data sets' own formats, written independently of the readers."""

import gzip
import json
import pickle
import struct
from pathlib import Path

import numpy as np


def write_idx(path: Path, values: np.ndarray, magic: int | None = None) -> None:
    """An IDX file of bytes; gzipped where the name says so."""
    magic = 2048 + values.ndim if magic is None else magic
    header = struct.pack(f">{1 + values.ndim}i", magic, *values.shape)
    content = header + values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_mnist(folder: Path, train: int = 12, test: int = 5, side: int = 28) -> None:
    """The four files of MNIST, of random images; two of them gzipped."""
    generator = np.random.default_rng(0)
    for part, count, ending in (("train", train, ""), ("t10k", test, ".gz")):
        images = generator.integers(0, 256, (count, side, side))
        labels = np.arange(count) % 10
        write_idx(folder / f"{part}-images-idx3-ubyte{ending}", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte{ending}", labels)


def cifar_part(name: str, count: int = 4) -> tuple[np.ndarray, list[int]]:
    """Pixels ``[count, 3072]`` and labels of a batch, random but the same every time."""
    generator = np.random.default_rng(sum(name.encode()))
    pixels = generator.integers(0, 256, (count, 3072)).astype(np.uint8)
    return pixels, [int(label) for label in (np.arange(count) + len(name)) % 10]


CIFAR_NAMES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")


def write_cifar_pickles(folder: Path, count: int = 4) -> None:
    """Python batches, pickled by protocol 2, as Python 2 wrote them (with keys of bytes)."""
    for name in CIFAR_NAMES:
        pixels, labels = cifar_part(name, count)
        batch = {b"batch_label": b"a batch", b"labels": labels, b"data": pixels}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))


def write_cifar_binary(folder: Path, count: int = 4) -> None:
    """Binary batches: a byte of label before the pixels of each image."""
    for name in CIFAR_NAMES:
        pixels, labels = cifar_part(name, count)
        rows = b"".join(
            bytes([label]) + row.tobytes() for label, row in zip(labels, pixels, strict=True)
        )
        (folder / f"{name}.bin").write_bytes(rows)


def variable_number(value: int) -> bytes:
    """A number in groups of seven bits, the highest first."""
    groups = [value & 0x7F]
    while value := value >> 7:
        groups.append(value & 0x7F | 0x80)
    return bytes(reversed(groups))


def track(*events: tuple[int, bytes]) -> bytes:
    """A track chunk of (delta time, bytes of the event), with its end."""
    body = b"".join(variable_number(delta) + event for delta, event in events)
    body += b"\x00\xff\x2f\x00"
    return b"MTrk" + struct.pack(">I", len(body)) + body


def midi(*tracks: bytes, division: int = 480, form: int = 1) -> bytes:
    """A MIDI file of track chunks."""
    return b"MThd" + struct.pack(">IHHH", 6, form, len(tracks), division) + b"".join(tracks)


def tempo(microseconds: int) -> bytes:
    """A tempo event: microseconds a quarter note."""
    return b"\xff\x51\x03" + microseconds.to_bytes(3, "big")


def scale(pitch: int, notes: int) -> bytes:
    """A file of notes going up, an eighth each, by running status."""
    events = [(0, b"\x90" + bytes([pitch, 80])), (240, bytes([pitch, 0]))]
    for step in range(1, notes):
        events += [(0, bytes([pitch + step % 12, 80])), (240, bytes([pitch + step % 12, 0]))]
    return midi(track(*events), form=0)


def write_maestro(folder: Path, train: int = 2, test: int = 2, notes: int = 200) -> None:
    """A table of MAESTRO and its MIDI files."""
    rows = ["canonical_composer,canonical_title,split,year,midi_filename,audio_filename,duration"]
    for split, count in (("train", train), ("test", test), ("validation", 1)):
        for number in range(count):
            name = f"2018/{split}{number}.midi"
            (folder / "2018").mkdir(exist_ok=True)
            (folder / name).write_bytes(scale(40 + number, notes))
            rows.append(f'"Chopin, F.",Etude {number},{split},2018,{name},{name}.wav,1.5')
    (folder / "maestro-v3.0.0.csv").write_text("\n".join(rows) + "\n")


def write_tokenizer(folder: Path) -> int:
    """GPT-2's tokenizer files with all bytes and a few merges; the number of tokens."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    symbols = [chr(byte) for byte in visible] + [chr(256 + i) for i in range(len(hidden))]
    words = [*symbols, "Ġt", "Ġth", "Ġthe", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nĠ t\nĠt h\nĠth e\n")
    return len(words)
