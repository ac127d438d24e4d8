"""Finds, orders and loads the checkpoints of a training run.

``checkpoint_table`` lists them; ``load_checkpoint`` is the default ``checkpoints_load_func``.
"""

import glob
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from influence_kit.checkpoints import files as checkpoint_files
from influence_kit.checkpoints.fitting import fitting
from influence_kit.core.arguments import refuse_deep, shown
from influence_kit.core.objects import check_model
from influence_kit.errors import InvalidArgumentError
from influence_kit.learning_rates.rate import Rate
from influence_kit.preservation.dropout_masks import checked_masks, set_masks
from influence_kit.preservation.restore import load_whole

LoadFunction = Callable[[nn.Module, Any], float]
# what can be iterated over and is not a list of checkpoints, or has no order
NO_LISTS = (Mapping, Set, bytes, Tensor, nn.Module)
# folders that training scripts write next to the final model
RUN_FOLDER = re.compile(r"checkpoint-.*|(checkpoint|step|epoch)[-_]\d+")


def find_checkpoints(checkpoints: Any, any_file: bool = False) -> list[Any]:
    """The checkpoints that the argument stands for, in the order of the numbers in their names.

    Args:
        checkpoints: a folder, a glob pattern, a list of paths (ordered by number, as Captum does),
            or any iterable of checkpoints (state dicts, say), which keeps its own order.
        any_file: take every file of a folder, because the user's own load function reads them.

    Raises:
        InvalidArgumentError: if there are no checkpoints, or a folder holds a file of another kind.
    """
    if isinstance(checkpoints, str | Path):
        return _find_paths(checkpoints, any_file)
    if isinstance(checkpoints, NO_LISTS) or not isinstance(checkpoints, Iterable):
        raise InvalidArgumentError(
            "Invalid checkpoints provided for TracIn class: expected a folder, a glob or an "
            f"iterable of checkpoints, got a {type(checkpoints).__name__}; put a single one into a "
            "list"
        )
    if getattr(checkpoints, "ndim", 1) == 0:
        raise InvalidArgumentError(
            "Invalid checkpoints provided for TracIn class: a single value, "
            f"{shown(checkpoints)}; put a single checkpoint into a list"
        )
    refuse_deep(checkpoints, "checkpoints")
    found = list(checkpoints)
    if not found:
        raise InvalidArgumentError("Invalid checkpoints provided for TracIn class: an empty list")
    if isinstance(checkpoints, list) and all(isinstance(item, str | Path) for item in found):
        return sorted(found, key=_natural)
    return found


def _find_paths(pattern: str | Path, any_file: bool) -> list[str]:
    folder, problem = Path(pattern), f"Invalid checkpoints provided for TracIn class: {pattern}!"
    if folder.is_file():
        raise InvalidArgumentError(f"{problem} It is a file: pass a list of files")
    if folder.is_dir():
        runs = [p for p in folder.iterdir() if RUN_FOLDER.fullmatch(p.name) and p.is_dir()]
        if checkpoint_files.is_trainer_folder(folder) and not runs:
            return [str(folder)]
        entries = runs or [path for path in folder.iterdir() if not path.name.startswith(".")]
        _refuse_foreign(entries, any_file)
        found = [str(path) for path in entries]
    else:
        found = glob.glob(str(pattern))
    if not found:
        kind = "The folder is empty" if folder.is_dir() else "There is no such folder or file"
        raise InvalidArgumentError(f"{problem} {kind}")
    return sorted(found, key=_natural)


def _refuse_foreign(entries: Sequence[Path], any_file: bool) -> None:
    foreign = [path.name for path in entries if not checkpoint_files.is_readable(path)]
    if foreign and not any_file:
        raise InvalidArgumentError(
            f"the checkpoint folder holds files that are not checkpoints: {sorted(foreign)}; "
            f"checkpoints end in {', '.join(checkpoint_files.SUFFIXES)} or are folders of Hugging "
            "Face's Trainer or accelerate. Pass a glob such as 'folder/*.pt', or a "
            "`checkpoints_load_func`"
        )


def _natural(path: str | Path) -> list[tuple[int, Any]]:
    """A sort key in which ck2 comes before ck10."""
    parts = re.split(r"(\d+)", str(path))
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts]


def load_checkpoint(model: nn.Module, checkpoint: Any) -> float:
    """Load a path or a state dict into the model; returns its learning rate (1 if none is stored).

    The rate is the one stored as ``learning_rate`` or ``lr``, or else the one that was applied in
    the last step before the checkpoint was saved; ``checkpoint_table`` shows where it was found.
    Prefixes of wrappers (``module.``, ``model.``, ...) are stripped if the keys fit only then.
    Weights tied to others may be missing.

    Raises:
        InvalidArgumentError: if keys, shapes or kinds of numbers (complex, real) do not fit, before
            anything is loaded; if the learning rate is not one number; for a file that cannot be
            read. The model then has the weights that it had before, which are copied for that.

    Warns:
        UserWarning: if the applied learning rate could only be estimated, or if a checkpoint of a
            known trainer has none.

    Example:
        >>> from torch import nn
        >>> model = nn.Linear(2, 1)
        >>> load_checkpoint(model, {"state_dict": model.state_dict(), "learning_rate": 0.1})
        0.1
    """
    rate = load_with_rate(model, checkpoint)
    caution = rate.warning(label_of(checkpoint))
    if caution is not None:
        warnings.warn(caution, stacklevel=2)
    return rate.value


def load_with_rate(model: nn.Module, checkpoint: Any) -> Rate:
    """``load_checkpoint`` without its warnings; the learning rate with where it was found."""
    check_model(model)
    contents = checkpoint_files.read(checkpoint)
    weights = fitting(model, contents, label_of(checkpoint))
    masks = checked_masks(model, contents.masks)
    load_whole(model, partial(_load, model, weights))
    set_masks(model, masks)
    return contents.rate


def _load(model: nn.Module, weights: dict[str, Any]) -> None:
    try:
        model.load_state_dict(weights, strict=False)
    except Exception as error:  # of a layer's own loading, or of a kind of tensor without copies
        raise InvalidArgumentError(
            f"the model did not load the checkpoint, and has the weights it had before ({error}); "
            "load it with a `checkpoints_load_func` of your own"
        ) from error


def label_of(checkpoint: Any) -> str:
    """A checkpoint's name in messages."""
    return f"'{checkpoint}'" if isinstance(checkpoint, str | Path) else "in memory"


@dataclass(frozen=True)
class CheckpointRow:
    """One line of ``checkpoint_table``.

    Args:
        checkpoint: the path of the checkpoint.
        step: the step or epoch at which it was saved.
        learning_rate: the learning rate that weights it.
        rate_source: where the learning rate was found.
        rate_kind: "stored" with the weights, "applied" in the last step before the checkpoint was
            saved, "estimated" (it may differ from the applied one) or "none".
    """

    checkpoint: str
    step: int | None
    learning_rate: float
    rate_source: str
    rate_kind: str


class CheckpointTable(list[CheckpointRow]):
    """The rows of ``checkpoint_table``; prints as a table."""

    def __str__(self) -> str:
        lines = [("checkpoint", "step", "learning rate", "kind", "found")]
        for row in self:
            step = "-" if row.step is None else str(row.step)
            rate = f"{row.learning_rate:g}"
            lines.append((row.checkpoint, step, rate, row.rate_kind, row.rate_source))
        widths = [max(len(line[i]) for line in lines) for i in range(5)]
        padded = (
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) for line in lines
        )
        return "\n".join(line.rstrip() for line in padded)


def checkpoint_table(checkpoints: Any) -> CheckpointTable:
    """The checkpoints that a method would use: name, step, learning rate and where it was found.

    The kind of the rate is "stored", "applied", "estimated" or "none" (``CheckpointRow``).

    Example:
        >>> print(checkpoint_table([{"state_dict": {}, "learning_rate": 0.1, "epoch": 3}]))
        checkpoint   step  learning rate  kind    found
        in memory 0  3     0.1            stored  stored as 'learning_rate'
    """
    table = CheckpointTable()
    for index, item in enumerate(find_checkpoints(checkpoints)):
        contents = checkpoint_files.read(item)
        rate = contents.rate
        name = str(item) if isinstance(item, str | Path) else f"in memory {index}"
        table.append(CheckpointRow(name, contents.step, rate.value, rate.source, rate.kind))
    return table
