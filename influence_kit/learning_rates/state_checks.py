"""Checks of the states of optimizers and schedulers that are saved beside the weights.

They are read for the learning rate alone. ``of_given_states`` says of which file they are.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from torch import Tensor

from influence_kit.core.arguments import shown
from influence_kit.learning_rates.rate import is_one_number

State = Mapping[str, Any]
# numbers in a scheduler's state, and lists of one number per parameter group
NUMBERS = ("last_epoch", "cooldown", "cooldown_counter", "num_bad_epochs", "factor")
LISTS = ("_last_lr", "base_lrs", "max_lrs", "base_momentums", "max_momentums")
# deeper than any chain of schedulers
DEEPEST = 20


def check_states(optimizers: Sequence[State], schedulers: Sequence[State]) -> None:
    """Refuse states of optimizers and schedulers that are not built as torch builds them.

    Args:
        optimizers: the state dicts of the optimizers.
        schedulers: the state dicts of the schedulers.

    Raises:
        ValueError: with the key and what is there.
    """
    for optimizer in optimizers:
        _check_optimizer(optimizer)
    for scheduler in schedulers:
        _check_scheduler(scheduler)


def _check_optimizer(optimizer: State) -> None:
    groups = optimizer.get("param_groups", [])
    if not isinstance(groups, list | tuple) or not all(isinstance(g, Mapping) for g in groups):
        _refuse("param_groups", groups, "a list of dicts")
    for group in groups:
        for key in ("lr", "initial_lr", "momentum", "dampening"):
            if key in group and not _is_finite(group[key]):
                _refuse(key, group[key], "a finite number")
    steps = optimizer.get("state", {})
    if not isinstance(steps, Mapping):
        _refuse("state", steps, "a dict")
    for values in steps.values():
        step = values.get("step") if isinstance(values, Mapping) else None
        if step is not None and not _is_finite(step):
            _refuse("step", step, "a finite number")


def _check_scheduler(scheduler: State, depth: int = 0) -> None:
    for key in NUMBERS:
        if key in scheduler and not _is_finite(scheduler[key]):
            _refuse(key, scheduler[key], "a finite number")
    for key in LISTS:
        if not _are_numbers(scheduler.get(key, [])):
            _refuse(key, scheduler[key], "a list of finite numbers")
    for key, value in scheduler.items():
        if isinstance(value, Tensor) and not _is_finite(value):
            _refuse(key, value, "a number")
    parts = scheduler.get("_schedulers", [])
    fine = isinstance(parts, list | tuple) and all(isinstance(part, Mapping) for part in parts)
    if not fine or ("_schedulers" in scheduler and not parts) or depth > DEEPEST:
        _refuse("_schedulers", parts, "a list of one or more states of schedulers")
    if "_milestones" in scheduler:
        _check_milestones(scheduler, len(parts))
    for part in parts:
        _check_scheduler(part, depth + 1)


def _check_milestones(scheduler: State, parts: int) -> None:
    milestones = scheduler["_milestones"]
    if not _are_numbers(milestones) or parts != len(milestones) + 1:
        _refuse("_milestones", milestones, f"a list of {max(parts - 1, 0)} numbers")


def has_usual_rates(scheduler: State) -> bool:
    """Whether another checkpoint's scheduler can be compared: its rates are lists of numbers."""
    return all(_are_numbers(scheduler.get(key, [])) for key in ("_last_lr", "base_lrs"))


def _is_finite(value: Any) -> bool:
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) < 2**63
    return is_one_number(value) and math.isfinite(float(value))


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list | tuple) and all(_is_finite(value) for value in values)


def _refuse(key: str, value: Any, wanted: str) -> NoReturn:
    raise ValueError(f"{key} must be {wanted}; got {shown(value)}")
