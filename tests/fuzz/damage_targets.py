"""Damaged folders: of checkpoints in all formats, and of each kind that the library writes."""

import math
import shutil
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from folders import KINDS, Kind, similar
from safetensors.torch import save_file
from torch import Tensor, nn

import influence_kit as ik
from fuzz.bad_input import Target
from fuzz.damage import Damage, at_random, by_forging
from fuzz.folder_targets import KEPT, listed, loaded, selected, trainer_folder
from fuzz.method_targets import checkpoint, is_, network, train
from fuzz.watch import LetIn

SEEDS = 250  # of each sort of damage, to each kind of folder
FOREIGN = {"mine.txt": b"of the user", "mine.part": b"the only copy"}


def nothing(folder: Path) -> None:
    """No damage."""


def activations(folder: Path, version: int) -> list[Tensor]:
    """What is read, and computed again where that is damaged."""
    return similar(folder, version)


READS = {name: activations if name == "activations" else kind.read for name, kind in KINDS.items()}


@cache
def whole(name: str) -> tuple[Path, list[Tensor]]:
    """A folder of a kind, and what is read from it."""
    folder = Path(mkdtemp(), "whole")
    KINDS[name].write(folder, 0)
    return folder, READS[name](folder, 0)


def copied(name: str, damage: Damage) -> Path:
    """A damaged copy of such a folder, with files of the user's."""
    folder = Path("given").absolute()
    shutil.copytree(whole(name)[0], folder)
    damage(folder / KINDS[name].holds)
    for file, text in FOREIGN.items():
        (folder / KINDS[name].holds / file).write_bytes(text)
    return folder


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-9, atol=1e-12)
        for a, b in zip(found, expected, strict=True)
    )


def look_at_foreign(folder: Path, kind: Kind) -> None:
    for file, text in FOREIGN.items():
        if (folder / kind.holds / file).read_bytes() != text:
            raise LetIn(f"the user's {file} was touched")


def read(name: str, is_exact: bool, damage: Damage) -> str:
    """Read a damaged folder: the right numbers, or an error."""
    folder = copied(name, damage)
    try:
        found = READS[name](folder, 0)
    finally:
        look_at_foreign(folder, KINDS[name])
    if is_exact and not same(found, whole(name)[1]):
        raise LetIn("other numbers were read")
    return "read"


def write(name: str, is_exact: bool, damage: Damage) -> str:
    """Write over a damaged folder: what is read then is what was written, or there is an error."""
    folder, kind = copied(name, damage), KINDS[name]
    version = int(kind.replaces)
    try:
        kind.write(folder, version)
    finally:
        look_at_foreign(folder, kind)
    if is_exact and not same(READS[name](folder, version), expected(name, version)):
        raise LetIn("other numbers were written")
    return "written"


@cache
def expected(name: str, version: int) -> list[Tensor]:
    folder = Path(mkdtemp(), "expected")
    KINDS[name].write(folder, version)
    return READS[name](folder, version)


def _of_ours() -> list[Target]:
    sorts: dict[str, tuple[Callable[[int], Damage], bool]] = {
        "at random": (at_random, True),
        "forged manifest": (partial(by_forging, manifest=True), True),
        # who forges the header of a file may say anything of its numbers
        "forged header": (partial(by_forging, manifest=False), False),
    }
    return [
        _target(f"{does.__name__} {name}, {sort}", partial(does, name, is_exact), make)
        for name in KINDS
        for does in (read, write)
        for sort, (make, is_exact) in sorts.items()
    ]


def _target(name: str, call: Callable[..., Any], make: Callable[[int], Damage]) -> Target:
    bad = {f"damage {seed}": partial(make, seed) for seed in range(SEEDS)}
    return Target(name, call, {"damage": is_(nothing)}, {"damage": set(bad)}, bad)


# Checkpoints, in the formats of others.


def one_file(folder: Path, old: bool = False, wrapped: bool = False) -> None:
    folder.mkdir()
    held = checkpoint(1) if wrapped else network(1).state_dict()
    torch.save(held, folder / "epoch-3.pt", _use_new_zipfile_serialization=not old)


def one_safetensors(folder: Path) -> None:
    folder.mkdir()
    save_file(network(1).state_dict(), folder / "epoch-3.safetensors", {"learning_rate": "0.1"})


def one_trainer_folder(folder: Path) -> None:
    trainer_folder(folder, "", "", KEPT)


FORMATS = {
    "torch": one_file,
    "torch, old": partial(one_file, old=True),
    "torch, with a rate": partial(one_file, wrapped=True),
    "safetensors": one_safetensors,
    "Trainer": one_trainer_folder,
}


def scored(path: Path) -> Tensor:
    """A method's scores of it, that are numbers."""
    data = train()
    method = ik.TracInCP(network(), data, [path], loss_fn=nn.CrossEntropyLoss(), batch_size=4)
    found = method.influence(data[:2])
    assert all(map(math.isfinite, found.flatten().tolist()))
    return found


def given(make: Callable[[Path], None], does: Callable[[Path], Any], damage: Damage) -> Any:
    folder = Path("checkpoint-3").absolute()
    make(folder)
    path = folder if (folder / "config.json").exists() else next(folder.iterdir())
    damage(folder)
    return does(path)


def _of_others() -> list[Target]:
    return [
        _target(f"{does.__name__}: {name}", partial(given, make, does), at_random)
        for name, make in FORMATS.items()
        for does in (loaded, listed, selected, scored)
    ]


TARGETS = [*_of_ours(), *_of_others()]
