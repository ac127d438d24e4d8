"""Checks of what trainers save beside the weights: states of optimizers, schedulers, the Trainer.

They are read for the learning rate alone. What has another type there than trainers write is
refused, with the place of it: the file is damaged, or of a program that is not known.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from influence_kit.core.arguments import shown
from influence_kit.errors import InvalidArgumentError
from influence_kit.learning_rates.rate import is_one_number

State = Mapping[str, Any]
# numbers in a scheduler's state, and lists of one number per parameter group
NUMBERS = ("last_epoch", "cooldown", "cooldown_counter", "num_bad_epochs", "factor")
LISTS = ("_last_lr", "base_lrs", "max_lrs", "base_momentums", "max_momentums")
# deeper than any chain of schedulers
DEEPEST = 20


def check_states(optimizers: Sequence[State], schedulers: Sequence[State], where: str) -> None:
    """Refuse states of optimizers and schedulers that are not built as torch builds them.

    Args:
        optimizers: the state dicts of the optimizers.
        schedulers: the state dicts of the schedulers.
        where: the file or key that they are in.

    Raises:
        InvalidArgumentError: with the key and what is there.
    """
    for optimizer in optimizers:
        _check_optimizer(optimizer, where)
    for scheduler in schedulers:
        _check_scheduler(scheduler, where)


def _check_optimizer(optimizer: State, where: str) -> None:
    groups = optimizer.get("param_groups", [])
    if not isinstance(groups, list | tuple) or not all(isinstance(g, Mapping) for g in groups):
        _refuse(where, "param_groups", groups, "a list of dicts")
    for group in groups:
        for key in ("lr", "initial_lr", "momentum", "dampening"):
            if key in group and not _is_finite(group[key]):
                _refuse(where, key, group[key], "a finite number")
    steps = optimizer.get("state", {})
    if not isinstance(steps, Mapping):
        _refuse(where, "state", steps, "a dict")
    for values in steps.values():
        step = values.get("step") if isinstance(values, Mapping) else None
        if step is not None and not _is_finite(step):
            _refuse(where, "step", step, "a finite number")


def _check_scheduler(scheduler: State, where: str, depth: int = 0) -> None:
    for key in NUMBERS:
        if key in scheduler and not _is_finite(scheduler[key]):
            _refuse(where, key, scheduler[key], "a finite number")
    for key in LISTS:
        if not _are_numbers(scheduler.get(key, [])):
            _refuse(where, key, scheduler[key], "a list of finite numbers")
    for key, value in scheduler.items():
        if isinstance(value, Tensor) and not _is_finite(value):
            _refuse(where, key, value, "a number")
    parts = scheduler.get("_schedulers", [])
    fine = isinstance(parts, list | tuple) and all(isinstance(part, Mapping) for part in parts)
    if not fine or ("_schedulers" in scheduler and not parts) or depth > DEEPEST:
        _refuse(where, "_schedulers", parts, "a list of one or more states of schedulers")
    if "_milestones" in scheduler:
        _check_milestones(scheduler, len(parts), where)
    for part in parts:
        _check_scheduler(part, where, depth + 1)


def _check_milestones(scheduler: State, parts: int, where: str) -> None:
    milestones = scheduler["_milestones"]
    if not _are_numbers(milestones) or parts != len(milestones) + 1:
        _refuse(where, "_milestones", milestones, f"a list of {max(parts - 1, 0)} numbers")


def has_usual_rates(scheduler: State) -> bool:
    """Whether another checkpoint's scheduler can be compared: its rates are lists of numbers."""
    return all(_are_numbers(scheduler.get(key, [])) for key in ("_last_lr", "base_lrs"))


def check_trainer_state(state: Any, file: Path) -> None:
    """Refuse a ``trainer_state.json`` that is not built as the Trainer builds it.

    Raises:
        InvalidArgumentError: with the key and what is there.
    """
    where = f"'{file}'"
    if not isinstance(state, dict):
        _refuse(where, "the file", state, "a dict")
    for key in ("global_step", "max_steps"):
        value = state.get(key)
        if value is not None and (type(value) is not int or not -1 <= value < 2**63):
            _refuse(where, key, value, "an int")
    logs = state.get("log_history", [])
    if not isinstance(logs, list) or not all(isinstance(entry, dict) for entry in logs):
        _refuse(where, "log_history", logs, "a list of dicts")
    for entry in logs:
        for key in ("step", "learning_rate"):
            if key in entry and not _is_finite(entry[key]):
                _refuse(where, f"{key} in log_history", entry[key], "a finite number")


def _is_finite(value: Any) -> bool:
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) < 2**63
    return is_one_number(value) and math.isfinite(float(value))


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list | tuple) and all(_is_finite(value) for value in values)


def _refuse(where: str, key: str, value: Any, wanted: str) -> NoReturn:
    raise InvalidArgumentError(
        f"{where or 'a checkpoint'} is damaged, or not of torch or the Trainer: {key} must be "
        f"{wanted}; got {shown(value)}. Save the checkpoint again, or pass a "
        "`checkpoints_load_func` that returns the learning rate"
    )
