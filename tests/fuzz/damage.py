"""Damage to a folder of files, drawn by a seed: at random, or by someone who forges checksums."""

import json
import os
import random
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from influence_kit.storage.checksums import sealed

HUGE = 4 * 2**30
# names of ours under which something else may stand
NAMES = (
    ".influence_kit.lock",
    f".influence_kit-{'0' * 32}.part",
    "manifest.json",
    "manifest.json.part",
    "final.safetensors",
    "step-99.safetensors",
    "step-007.safetensors",
    f"tensors-{'0' * 16}.safetensors",
    "9999-000000.safetensors",
)
# a user's file in the working directory of a call, see ``watch.FILES``
ELSEWHERE = "notes.txt"

# Bytes at random.


def _flip(data: bytes, draws: random.Random) -> bytes:
    held = bytearray(data)
    if held:
        held[draws.randrange(len(held))] ^= 1 << draws.randrange(8)
    return bytes(held)


def _cut(data: bytes, draws: random.Random) -> bytes:
    return data[: draws.randrange(len(data) + 1)]


def _blank(data: bytes, draws: random.Random) -> bytes:
    start = draws.randrange(len(data) + 1)
    stop = min(len(data), start + draws.choice([1, 8, 100, 4096]))
    return data[:start] + draws.choice([b"\0", b"\xff"]) * (stop - start) + data[stop:]


def _noise(data: bytes, draws: random.Random) -> bytes:
    start = draws.randrange(len(data) + 1)
    return data[:start] + draws.randbytes(draws.choice([1, 8, 100])) + data[start:]


def _insides(data: bytes, draws: random.Random) -> bytes:
    start, stop = sorted(draws.randrange(len(data) + 1) for _ in range(2))
    return data[:start] + data[stop:]


def _number(data: bytes, draws: random.Random) -> bytes:
    """A number in text is another one."""
    found = list(re.finditer(rb"\d+", data[:4000]))
    if not found:
        return data
    match = draws.choice(found)
    other = draws.choice([b"0", b"-1", b"7", b"1e999", b"9" * 20, b"9" * 400, b"NaN"])
    return data[: match.start()] + other + data[match.end() :]


def _length(data: bytes, draws: random.Random) -> bytes:
    """The length of a safetensors header is another one."""
    return draws.choice([0, 1, 2**31, 2**62, 2**64 - 1]).to_bytes(8, "little") + data[8:]


BYTES = (_flip, _flip, _cut, _blank, _noise, _insides, _number, _length)

# Files that are something else.


def _fifo(path: Path, draws: random.Random) -> None:
    os.mkfifo(path)


def _folder(path: Path, draws: random.Random) -> None:
    path.mkdir()


def _socket(path: Path, draws: random.Random) -> None:
    with socket.socket(socket.AF_UNIX) as made, suppress(OSError):  # too long a path
        made.bind(str(path))


def _link(path: Path, draws: random.Random) -> None:
    there = Path(ELSEWHERE).absolute()
    path.symlink_to(draws.choice([path.name, "nowhere", "/dev/zero", "/dev/full", there, "."]))


def _sparse(path: Path, draws: random.Random) -> None:
    with path.open("wb") as file:
        file.write(draws.choice([b"", b"PK\3\4", b"\2" + b"\0" * 7 + b"{}", b"{"]))
        file.truncate(draws.choice([HUGE, 64 * HUGE]))


def _text(path: Path, draws: random.Random) -> None:
    path.write_bytes(draws.choice([b"", b"{}", b"[]", b"null", b"\xff\xfe", b"[" * 10**5]))


OTHERS = (_fifo, _folder, _socket, _link, _link, _sparse, _text)

# Checksums that are forged.

RAW = (
    *("null", "true", "-1", "0", "1", "1.5", "1e999", "-Infinity", "NaN", '""', '"text"', "[]"),
    *("{}", "9" * 20, "9" * 400, "9" * 5000, str(2**62), str(2**31), str(2**63), "1e308"),
    *(f"[{2**62}]", f"[{2**31}, {2**31}, 4]", "[-4, -3]", "[0]", "[null]", '{"a": 1}'),
    *('"../../x"', '"/etc/passwd"', '"a\\u0000b"', '"\\ud800"', '"float128"', '"F64"', '"Tensor"'),
    *("[" * 500 + "]" * 500, "[" * 10**5 + "]" * 10**5, '{"a":' * 900 + "1" + "}" * 900),
)
MARK = "the value that is forged"


def _paths(held: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """All paths of keys to a value, but that of the checksum of the whole."""
    items = held.items() if isinstance(held, dict) else enumerate(held[:4])
    for key, value in items:
        if key == "checksum" and len(path) < 2:
            continue
        if key != "__metadata__":  # without which there is no checksum
            yield (*path, key)
        if isinstance(value, dict | list):
            yield from _paths(value, (*path, key))


def _with_mark(held: Any, path: tuple[Any, ...]) -> tuple[Any, Any]:
    """A copy whose value at a path is a mark, and that value."""
    copy = json.loads(json.dumps(held))
    inside = copy
    for key in path[:-1]:
        inside = inside[key]
    value, inside[path[-1]] = inside[path[-1]], MARK
    return copy, value


def forged(text: bytes, draws: random.Random) -> bytes:
    """A sealed JSON text with one value, or the same key twice, under a checksum that is right."""
    held = json.loads(text)
    digest = (held if "checksum" in held else held["__metadata__"])["checksum"].encode()
    style = {"indent": 2} if b"\n" in text else {"separators": (",", ":")}
    path = draws.choice(list(_paths(held)))
    marked, value = _with_mark(held, path)
    raw = draws.choice(RAW)
    if draws.random() < 0.2 and isinstance(path[-1], str):
        raw = f"{raw}, {json.dumps(path[-1])}: {json.dumps(value)}"
    changed = json.dumps(marked, **style).replace(json.dumps(MARK), raw).encode()
    start = text[: text.index(digest)]
    return sealed(start, changed[changed.index(digest) + len(digest) :])


def _forge_file(path: Path, draws: random.Random) -> None:
    data = path.read_bytes()
    if path.suffix == ".json":
        path.write_bytes(forged(data, draws))
        return
    stop = 8 + int.from_bytes(data[:8], "little")
    header = forged(data[8:stop], draws)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[stop:])


# A folder.


def _change_bytes(files: list[Path], draws: random.Random) -> None:
    path = draws.choice(files)
    path.write_bytes(draws.choice(BYTES)(path.read_bytes(), draws))


def _replace(files: list[Path], draws: random.Random) -> None:
    path = draws.choice(files)
    path.unlink()
    draws.choice(OTHERS)(path, draws)


def _remove(files: list[Path], draws: random.Random) -> None:
    for path in draws.sample(files, draws.randint(1, len(files))):
        path.unlink()


def _exchange(files: list[Path], draws: random.Random) -> None:
    one, other = draws.choice(files), draws.choice(files)
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)


def _add(files: list[Path], draws: random.Random) -> None:
    path = files[0].parent / draws.choice(NAMES)
    if os.path.lexists(path):
        path.unlink()
    draws.choice(OTHERS)(path, draws)


AT_RANDOM = (_change_bytes, _change_bytes, _change_bytes, _replace, _remove, _exchange, _add)
Damage = Callable[[Path], None]


def at_random(seed: int) -> Damage:
    """One damage to the files in a folder, not one that forges checksums."""

    def damage(folder: Path) -> None:
        draws = random.Random(seed)
        draws.choice(AT_RANDOM)(_files_in(folder), draws)

    return damage


def by_forging(seed: int, manifest: bool) -> Damage:
    """One value in a manifest, or in the header of another file, and its checksum."""

    def damage(folder: Path) -> None:
        draws = random.Random(seed)
        files = [path for path in _files_in(folder) if (path.suffix == ".json") == manifest]
        _forge_file(draws.choice(files), draws)

    return damage


def _files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
