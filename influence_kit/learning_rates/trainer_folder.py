"""The applied learning rate of a ``checkpoint-N`` folder of Hugging Face's Trainer."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from influence_kit.core.arguments import is_finite_number, shown
from influence_kit.errors import InvalidArgumentError
from influence_kit.learning_rates.applied import TrainingState, applied_rate
from influence_kit.learning_rates.closed_forms import is_scheduler
from influence_kit.learning_rates.interpolation import rate_at
from influence_kit.learning_rates.rate import APPLIED, Rate, one_rate
from influence_kit.learning_rates.siblings import folders_beside, numbered_folders, rates_of
from influence_kit.learning_rates.state_checks import check_states, of_given_states
from influence_kit.storage.given_files import read_json
from influence_kit.storage.torch_files import values_of

TRAINER_STATE = "trainer_state.json"
Logs = dict[int, float]


def trainer_state(path: Path) -> dict[str, Any] | None:
    """The contents of a folder's ``trainer_state.json``; None if there is none."""
    file = path / TRAINER_STATE
    if not file.is_file():
        return None
    state = read_json(file)
    if not isinstance(state, dict):
        return None
    _check_state(file, state)
    return state


def _check_state(file: Path, state: Mapping[str, Any]) -> None:
    """Refuse a state whose steps and rates are not of the kinds that a Trainer writes."""
    wrong = [
        f"'{key}' {shown(state[key])} where a Trainer writes the number of a step"
        for key in ("global_step", "max_steps")
        if state.get(key) is not None and not _is_step(state[key], least=-1 if key[0] == "m" else 0)
    ]
    logs = state.get("log_history", [])
    if not isinstance(logs, list) or not all(isinstance(entry, dict) for entry in logs):
        wrong.append(f"'log_history' {shown(logs)} where a Trainer writes a list of dicts")
    else:
        wrong += [
            f"the log {shown(entry)} where a Trainer writes a step and finite numbers"
            for entry in logs
            if ("step" in entry and not _is_step(entry["step"]))
            or ("learning_rate" in entry and not is_finite_number(entry["learning_rate"]))
        ]
    if wrong:
        raise InvalidArgumentError(
            f"'{file}' has {wrong[0]}; copy the folder again, or pass a `checkpoints_load_func` "
            "that returns the learning rate"
        )


def _is_step(value: Any, least: int = 0) -> bool:
    return is_finite_number(value) and int(value) == value and value >= least


def logged_rates(state: Mapping[str, Any]) -> Logs:
    """The logged rates of a Trainer's state, by step."""
    entries = [e for e in state.get("log_history", []) if "learning_rate" in e and "step" in e]
    return {int(entry["step"]): float(entry["learning_rate"]) for entry in entries}


@of_given_states
def trainer_rate(path: Path, state: Mapping[str, Any]) -> Rate:
    """The learning rate of the last update before a folder was saved.

    Args:
        path: the folder.
        state: its ``trainer_state``.

    Raises:
        InvalidArgumentError: if parameter groups have different rates.
    """
    scheduler, logs = values_of(path / "scheduler.pt"), logged_rates(state)
    check_states((), [scheduler])
    step = int(state.get("global_step") or max(logs, default=0))
    following = one_rate(scheduler["_last_lr"]) if scheduler.get("_last_lr") else None
    evaluated = _from_scheduler(path, state, scheduler)
    if scheduler and evaluated is not None and evaluated.kind == APPLIED:
        return evaluated
    if step in logs and not _logged_late(path, logs, step, following):
        return Rate(logs[step], f"{TRAINER_STATE}, log of step {step}", APPLIED)
    if "patience" in scheduler:
        return _since_evaluation(state, logs, step) or evaluated or Rate(expected=True)
    logs = {s: rate for s, rate in logs.items() if s <= step} | _later_logs(path, logs, step)
    found = _between(path, state, scheduler, logs) if logs or following is not None else None
    return found or evaluated or Rate(expected=True)


def _since_evaluation(state: Mapping[str, Any], logs: Logs, step: int) -> Rate | None:
    """A rate logged since the last evaluation before this step: only evaluations change it."""
    last = max((s for s in _evaluations(state) if s < step), default=0)
    logged = [s for s in logs if last < s <= step]
    if not logged:
        return None
    source = f"{TRAINER_STATE}, log of step {max(logged)}, without an evaluation in between"
    return Rate(logs[max(logged)], source, APPLIED)


def _evaluations(state: Mapping[str, Any]) -> set[int]:
    """The steps at which the model was evaluated."""
    return {e["step"] for e in state.get("log_history", []) if "eval_loss" in e and "step" in e}


def _from_scheduler(
    path: Path, state: Mapping[str, Any], scheduler: Mapping[str, Any]
) -> Rate | None:
    """The rate from a closed form of PyTorch's schedulers, or from an optimizer without one."""
    plateau = "patience" in scheduler
    if not plateau and ("lr_lambdas" in scheduler or (scheduler and not is_scheduler(scheduler))):
        return None
    needed = not scheduler or "_schedule_phases" in scheduler
    optimizer = values_of(path / "optimizer.pt") if needed else {}
    # the Trainer steps a ReduceLROnPlateau when it evaluates, all others after each update
    back = 0 if plateau and state.get("global_step") not in _evaluations(state) else 1
    held = TrainingState(
        [optimizer] if optimizer else [],
        [scheduler] if scheduler else [],
        "scheduler.pt" if scheduler else "optimizer.pt",
        back=back,
        others=lambda: rates_of(_schedulers_beside(path), scheduler),
    )
    return applied_rate(held)


def trainer_steps(path: Path, state: Mapping[str, Any]) -> TrainingState:
    """The optimizer and the scheduler of a folder, and its number of steps."""
    optimizer, scheduler = values_of(path / "optimizer.pt"), values_of(path / "scheduler.pt")
    return TrainingState(
        [optimizer] if optimizer else [],
        [scheduler] if scheduler else [],
        "scheduler.pt",
        updates=state.get("global_step"),
        back=1,
        others=lambda: rates_of(_schedulers_beside(path), scheduler),
    )


def _logged_late(path: Path, logs: Logs, step: int, following: float | None) -> bool:
    """Whether the log of a step has the rate of the next step, as before transformers 4.51.

    Such a log equals the scheduler's rate, although the rate changes from log to log.
    """
    version = _version(path)
    if following is None or logs[step] != following or (version and version >= (5,)):
        return version is not None and version < (4, 50)
    before = [s for s in logs if s < step]
    return logs[max(before)] != logs[step] if before else True


def _version(path: Path) -> tuple[int, ...] | None:
    file = path / "config.json"
    try:
        numbers = re.findall(r"\d+", read_json(file)["transformers_version"])
    except (ValueError, KeyError, TypeError):  # a version that is not known is guessed
        return None
    return tuple(int(number) for number in numbers[:2]) or None


def _later_logs(path: Path, logs: Logs, step: int) -> Logs:
    """The logs after a step, from states that were saved later in the same run."""
    states = [trainer_state(folder) for folder in (*numbered_folders(path)[-1:], path.parent)]
    for state in states:
        later = logged_rates(state) if state else {}
        if later.items() >= {s: rate for s, rate in logs.items() if s <= step}.items():
            return {s: rate for s, rate in later.items() if s > step}
    return {}


def _between(
    path: Path, state: Mapping[str, Any], scheduler: Mapping[str, Any], logs: Logs
) -> Rate | None:
    """The rate from those known at other steps: from logs, and the next steps of all checkpoints.

    Steps of the schedule are counted from 0: the first update has the rate after 0 steps.
    """
    step = int(state.get("global_step") or max(logs, default=0))
    taken = scheduler.get("last_epoch", step)
    held = rates_of([scheduler, *_schedulers_beside(path)], scheduler) if scheduler else {}
    if scheduler.get("_last_lr"):
        held[taken] = float(scheduler["_last_lr"][0])
    bases = scheduler.get("base_lrs")
    base = one_rate(bases) if bases else None
    found = []
    conventions = _conventions(path, logs, step, held.get(taken))
    for late in conventions:
        # the scheduler took no step for updates that were skipped
        shift = taken - step - (0 if late else 1)
        known = {s + shift: rate for s, rate in logs.items()} | held
        if len(conventions) > 1 and taken - 1 not in held:
            # the previous log is only used if the other rates confirm that logs are late
            known.pop(taken - 1, None)
        rate = rate_at(taken - 1, known, base, state.get("max_steps"))
        found += [] if rate is None else [rate]
    certain = [rate for rate in found if rate.kind == APPLIED]
    return next(iter(certain or found), None)


def _conventions(path: Path, logs: Logs, step: int, following: float | None) -> list[bool]:
    """Whether logs have the rate of the next step: the possible answers, the likelier first."""
    version = _version(path)
    if version and version >= (5,):
        return [False]
    if step in logs or (version and version < (4, 50)):
        return [_logged_late(path, logs, step, following)] if step in logs else [True]
    return [False, True]


def _schedulers_beside(path: Path) -> list[dict[str, Any]]:
    return [values_of(folder / "scheduler.pt") for folder in folders_beside(path)]
