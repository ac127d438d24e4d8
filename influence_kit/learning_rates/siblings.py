"""Other checkpoints of the same run, and the learning rates in them."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from influence_kit.learning_rates.state_checks import has_usual_rates

MOST_OTHERS = 3  # how many checkpoints are read before and after one


def numbered_folders(path: Path) -> list[Path]:
    """A checkpoint folder and its siblings, in the order of the numbers that end their names."""
    stem = re.sub(r"\d+$", "", path.name)
    numbers = {p: p.name[len(stem) :] for p in path.parent.glob(f"{stem}*") if p.is_dir()}
    return sorted((p for p, n in numbers.items() if n.isdigit()), key=lambda p: int(numbers[p]))


def folders_beside(path: Path) -> list[Path]:
    """The nearest folders before and after a checkpoint folder."""
    return nearest(numbered_folders(path), path)


def files_beside(path: Path) -> list[Path]:
    """The files with the same ending that were written just before and after a checkpoint."""
    files = [p for p in path.parent.glob(f"*{path.suffix}") if p.is_file()]
    return nearest(sorted(files, key=lambda p: p.stat().st_mtime_ns), path)


def nearest(paths: Sequence[Path], path: Path) -> list[Path]:
    """The paths before and after one of them."""
    index = next((i for i, p in enumerate(paths) if p.name == path.name), len(paths))
    return [*paths[max(0, index - MOST_OTHERS) : index], *paths[index + 1 :][:MOST_OTHERS]]


def rates_of(others: Sequence[Mapping[str, Any]], own: Mapping[str, Any]) -> dict[int, float]:
    """The rates in other states of the same scheduler, by number of steps."""
    return {
        other["last_epoch"]: float(other["_last_lr"][0])
        for other in others
        if has_usual_rates(other)
        and other.keys() == own.keys()
        and other.get("base_lrs") == own.get("base_lrs")
        and other.get("_last_lr")
        and isinstance(other.get("last_epoch"), int)
    }
