"""The applied rate of a file with weights, optimizers and schedulers in one dict.

Those of Lightning (``.ckpt``) and of loops of the user's own.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from influence_kit.learning_rates.applied import TrainingState, applied_rate
from influence_kit.learning_rates.rate import Rate
from influence_kit.torch_files import values_of

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
COUNTER_KEYS = ("epoch", "global_step", "step")
MOST_OTHERS = 3  # checkpoints read on each side


def wrapped_rate(saved: Mapping[str, Any], path: Path | None) -> Rate:
    """The applied rate of a checkpoint in one dict.

    Args:
        saved: what was saved.
        path: its file, whose neighbours may be of the same run.
    """
    lightning = "pytorch-lightning_version" in saved
    key, optimizers = _states(saved, OPTIMIZER_KEYS, "param_groups")
    scheduler_key, schedulers = _states(saved, SCHEDULER_KEYS, "last_epoch")
    where = f"optimizer state '{key}'"
    if scheduler_key:
        where += f", scheduler state '{scheduler_key}'"
    loops = saved.get("loops")
    state = TrainingState(
        optimizers,
        schedulers,
        where,
        counters=[saved[k] for k in COUNTER_KEYS if type(saved.get(k)) is int],
        back=_lightning_back(loops, schedulers) if lightning else None,
        others=lambda: _others(path, schedulers),
    )
    return applied_rate(state) or Rate(expected=lightning)


def _states(
    saved: Mapping[str, Any], keys: tuple[str, ...], mark: str
) -> tuple[str, list[Mapping[str, Any]]]:
    """The first key with state dicts that have the key ``mark``, and these."""
    for key in keys:
        held = saved.get(key)
        states = held if isinstance(held, list | tuple) else [held]
        found = [s for s in states if isinstance(s, Mapping) and mark in s]
        if found:
            return key, found
    return "", []


def _lightning_back(loops: Any, schedulers: list[Mapping[str, Any]]) -> int | None:
    """Whether Lightning stepped the scheduler after the last step of the optimizer.

    It does so before any checkpoint is saved, at each step or at the end of the epoch, except that
    ``ReduceLROnPlateau`` comes after it.
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
        return None  # several share one count; a manual loop steps them at will
    steps = schedulers[0]["last_epoch"]
    if "patience" in schedulers[0]:
        return 0 if steps == fit["epoch_progress"]["current"]["processed"] - last else None
    if not calls["total"]["completed"]:
        return 0 if not steps else None  # stepped by the user
    if called == 0:
        return 0
    if called == updates or (called == 1 and last):
        return 1
    # every `frequency` batches: the frequency is certain where one alone is possible
    possible = range(ready // (called + 1) + 1, ready // called + 1)
    after = {ready % frequency == 0 for frequency in possible}
    return int(after.pop()) if len(after) == 1 else None


def _others(path: Path | None, schedulers: list[Mapping[str, Any]]) -> dict[int, float]:
    """The rates of the checkpoints beside a file, by number of scheduler steps."""
    if path is None or not path.parent.is_dir():
        return {}
    beside = sorted(
        (p for p in path.parent.glob(f"*{path.suffix}") if p.is_file()),
        key=lambda p: p.stat().st_mtime_ns,
    )
    place = next((i for i, p in enumerate(beside) if p.samefile(path)), 0)
    near = beside[max(0, place - MOST_OTHERS) : place] + beside[place + 1 :][:MOST_OTHERS]
    found = [_states(values_of(p), SCHEDULER_KEYS, "last_epoch")[1] for p in near]
    return rates_of([states[0] for states in found if len(states) == 1], schedulers[0])


def rates_of(others: Sequence[Mapping[str, Any]], own: Mapping[str, Any]) -> dict[int, float]:
    """The rates of other states of the same scheduler, by number of steps."""
    return {
        other["last_epoch"]: float(other["_last_lr"][0])
        for other in others
        if other.keys() == own.keys()
        and other.get("base_lrs") == own.get("base_lrs")
        and other.get("_last_lr")
    }
