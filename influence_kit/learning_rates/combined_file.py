"""The applied learning rate of a file with weights, optimizers and schedulers in one dict.

Such files are written by Lightning (``.ckpt``) and by users' own loops.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from influence_kit.learning_rates.applied import TrainingState, applied_rate
from influence_kit.learning_rates.closed_forms import is_scheduler, steps_taken
from influence_kit.learning_rates.rate import Rate
from influence_kit.learning_rates.siblings import files_beside, rates_of
from influence_kit.learning_rates.state_checks import of_given_states
from influence_kit.storage.torch_files import values_of

OPTIMIZER_KEYS = (
    "optimizer_state_dict",
    "optimizer",
    "optimizer_states",
    "optimizer_state",
    "optim",
)
SCHEDULER_KEYS = (
    "lr_schedulers",
    "lr_scheduler_state_dict",
    "scheduler_state_dict",
    "lr_scheduler",
    "scheduler",
    "scheduler_state",
    "lr_sched",
    "sched",
)
UPDATE_KEYS = ("global_step", "step")
LIGHTNING = "pytorch-lightning_version"
State = Mapping[str, Any]


@of_given_states
def wrapped_rate(saved: State, path: Path | None) -> Rate:
    """The applied rate of a checkpoint in one dict; see ``wrapped_state`` for the arguments."""
    return applied_rate(wrapped_state(saved, path)) or Rate(expected=LIGHTNING in saved)


def wrapped_state(saved: State, path: Path | None) -> TrainingState:
    """The optimizers and schedulers of a checkpoint in one dict.

    Args:
        saved: the dict that was saved.
        path: its file; other files in the folder may be of the same run.
    """
    lightning = LIGHTNING in saved
    key, optimizers = _states(saved, OPTIMIZER_KEYS, _is_optimizer)
    scheduler_key, schedulers = _states(saved, SCHEDULER_KEYS, is_scheduler)
    where = f"optimizer state '{key}'"
    if scheduler_key:
        where += f", scheduler state '{scheduler_key}'"
    loops, epoch = saved.get("loops"), saved.get("epoch")
    # Lightning also saves within epochs: its epoch is not used if there are loop counters
    counts = type(epoch) is int and not (lightning and loops)
    return TrainingState(
        optimizers,
        schedulers,
        where,
        epochs=[int(epoch)] if counts and epoch is not None else [],
        updates=next((saved[k] for k in UPDATE_KEYS if type(saved.get(k)) is int), None),
        back=_lightning_back(loops, schedulers, epoch) if lightning else None,
        others=lambda: _others(path, schedulers),
    )


def _is_optimizer(state: Any) -> bool:
    return isinstance(state, Mapping) and "param_groups" in state


def _states(
    saved: State, keys: tuple[str, ...], fits: Callable[[Any], bool]
) -> tuple[str, list[State]]:
    """The first key with state dicts that fit, and those state dicts."""
    for key in keys:
        held = saved.get(key)
        states: list[Any] = list(held) if isinstance(held, list | tuple) else [held]
        found = [state for state in states if fits(state)]
        if found:
            return key, found
    return "", []


def _lightning_back(loops: Any, schedulers: Sequence[State], epoch: Any) -> int | None:
    """1 if Lightning stepped the scheduler after the optimizer's last step, 0 if not, or None.

    Lightning steps schedulers at each step or at the end of the epoch, before any checkpoint is
    saved, but ``ReduceLROnPlateau`` after it.
    """
    try:
        fit = loops["fit_loop"]
        calls = fit["epoch_loop.scheduler_progress"]
        batches = fit["epoch_loop.batch_progress"]
        optimizer = fit["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
        called, updates = calls["current"]["completed"], optimizer["step"]["current"]["completed"]
        ready, last = batches["current"]["ready"], batches["is_last_batch"]
    except (KeyError, TypeError):
        return None
    if len(schedulers) != 1 or not optimizer["step"]["total"]["completed"]:
        return None  # several share one count; a manual loop may step them at any time
    steps = steps_taken(schedulers[0])
    if "patience" in schedulers[0]:
        return 0 if steps == epoch else None
    if not calls["total"]["completed"]:
        return 0 if not steps else None  # stepped by the user
    if called == 0:
        return 0
    if called == updates or (called == 1 and last):
        return 1
    # every `frequency` batches: certain if only one frequency is possible
    possible = range(ready // (called + 1) + 1, ready // called + 1)
    after = {ready % frequency == 0 for frequency in possible}
    return int(after.pop()) if len(after) == 1 else None


def _others(path: Path | None, schedulers: Sequence[State]) -> dict[int, float]:
    """The rates of neighbouring checkpoint files, by number of scheduler steps."""
    if path is None:
        return {}
    found = [_states(values_of(p), SCHEDULER_KEYS, is_scheduler)[1] for p in files_beside(path)]
    return rates_of([states[0] for states in found if len(states) == 1], schedulers[0])
