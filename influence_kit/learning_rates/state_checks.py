"""Checks of the states of optimizers and schedulers that are saved beside the weights.

They are read for the learning rate alone. ``of_given_states`` names their file in errors.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn, ParamSpec, TypeVar

from torch import Tensor

from influence_kit.core.arguments import is_finite_number, shown
from influence_kit.errors import InvalidArgumentError

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
State = Mapping[str, Any]
# numbers in a scheduler's state, and lists of one number per parameter group
NUMBERS = ("last_epoch", "cooldown", "cooldown_counter", "num_bad_epochs", "factor")
LISTS = ("_last_lr", "base_lrs", "max_lrs", "base_momentums", "max_momentums")
# deeper than any chain of schedulers
DEEPEST = 20


class DamagedState(Exception):  # noqa: N818 - becomes the error that names the file
    """A state is not built as torch builds it."""


def of_given_states(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The function, with an error that names the file where ``check_states`` refuses a state."""

    @wraps(function)
    def read(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        try:
            return function(*args, **kwargs)
        except DamagedState as error:
            raise InvalidArgumentError(
                f"the state of an optimizer or scheduler {_place(args)} is not as torch saves it "
                f"({error}), so its learning rate is not known; store it "
                "with the weights as 'learning_rate', without that state, or pass a "
                "`checkpoints_load_func` that returns it"
            ) from error

    return read


def _place(args: tuple[Any, ...]) -> str:
    path = next((arg for arg in args if isinstance(arg, str | Path)), None)
    return "of a checkpoint in memory" if path is None else f"of '{path}'"


def check_states(optimizers: Sequence[State], schedulers: Sequence[State]) -> None:
    """Refuse states of optimizers and schedulers that are not built as torch builds them.

    Args:
        optimizers: the state dicts of the optimizers.
        schedulers: the state dicts of the schedulers.

    Raises:
        DamagedState: with the key and its value.
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
            if key in group and not is_finite_number(group[key]):
                _refuse(key, group[key], "a finite number")
    steps = optimizer.get("state", {})
    if not isinstance(steps, Mapping):
        _refuse("state", steps, "a dict")
    for values in steps.values():
        step = values.get("step") if isinstance(values, Mapping) else None
        if step is not None and not is_finite_number(step):
            _refuse("step", step, "a finite number")


def _check_scheduler(scheduler: State, depth: int = 0) -> None:
    for key in NUMBERS:
        if key in scheduler and not is_finite_number(scheduler[key]):
            _refuse(key, scheduler[key], "a finite number")
    for key in LISTS:
        if not _are_numbers(scheduler.get(key, [])):
            _refuse(key, scheduler[key], "a list of finite numbers")
    for key, value in scheduler.items():
        if isinstance(value, Tensor) and not is_finite_number(value):
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


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list | tuple) and all(is_finite_number(value) for value in values)


def _refuse(key: str, value: Any, wanted: str) -> NoReturn:
    raise DamagedState(f"{key} must be {wanted}; got {shown(value)}")
