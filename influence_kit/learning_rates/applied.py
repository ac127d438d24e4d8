"""The applied learning rate, from the states of optimizers and schedulers.

A scheduler's state holds the rate after its last step. Whether that step came after the optimizer's
last step (so that the applied rate is the one before) is inferred from counters.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from influence_kit.learning_rates.closed_forms import (
    closed_form,
    scheduler_name,
    steps_taken,
)
from influence_kit.learning_rates.interpolation import rate_at
from influence_kit.learning_rates.rate import APPLIED, ESTIMATED, Rate, one_rate
from influence_kit.learning_rates.state_checks import check_states

State = Mapping[str, Any]
NEXT = "the rate of the next step"


@dataclass(frozen=True)
class TrainingState:
    """The training state in a checkpoint, apart from the weights.

    Args:
        optimizers: the state dicts of the optimizers.
        schedulers: the state dicts of the schedulers.
        where: the file or key that they are in, for ``Rate.source``.
        epochs: numbers of epochs, or of saves, that were saved with them.
        updates: the number of optimizer updates that was saved with them; optimizers like Adam
            count their own.
        back: how many steps of the schedulers lie between the last step of the optimizer and the
            save; None to infer it from the counters.
        per_step: how many steps a scheduler takes at a time (one per process in accelerate).
        others: returns rates by number of scheduler steps, from other checkpoints of the run.
    """

    optimizers: Sequence[State]
    schedulers: Sequence[State]
    where: str
    epochs: Sequence[int] = ()
    updates: int | None = None
    back: int | None = None
    per_step: int = 1
    others: Callable[[], Mapping[int, float]] = field(default=dict)

    def __post_init__(self) -> None:
        check_states(self.optimizers, self.schedulers)


def applied_rate(state: TrainingState) -> Rate | None:
    """The rate of the optimizer's last step, if it can be found; None if there is no rate.

    Raises:
        InvalidArgumentError: if parameter groups, or optimizers, have different rates.
    """
    groups = [g for optimizer in state.optimizers for g in optimizer.get("param_groups", ())]
    current = [float(group["lr"]) for group in groups if "lr" in group]
    if not current:
        current = [float(rate) for s in state.schedulers[:1] for rate in s.get("_last_lr", ())]
    if not current:
        return None
    rate = one_rate(current)
    if not state.schedulers:
        return _unscheduled(groups, rate, state.where)
    back, certain = steps_back(state)
    if back == 0 and certain:
        return Rate(rate, f"{state.where}, scheduler not stepped since", APPLIED)
    before = _before(state, groups, current, back)
    if before is None:
        return Rate(rate, f"{state.where}: {NEXT}", ESTIMATED)
    if not certain and before.kind == APPLIED and not _equal(before.value, rate):
        source = f"{before.source}, if the scheduler was stepped before saving"
        return Rate(before.value, source, ESTIMATED)
    return before


def _unscheduled(groups: Sequence[State], rate: float, where: str) -> Rate:
    """The rate without a scheduler's state; ``initial_lr`` shows a scheduler that was not saved."""
    if not any("initial_lr" in group for group in groups):
        return Rate(rate, where, APPLIED)
    return Rate(rate, f"{where}: {NEXT}", ESTIMATED)


def _before(
    state: TrainingState, groups: Sequence[State], current: Sequence[float], back: int
) -> Rate | None:
    """The rate ``back`` scheduler steps ago."""
    names = [scheduler_name(scheduler) for scheduler in state.schedulers]
    if "ReduceLROnPlateau" in names:
        return _before_plateau(state, current[0]) if len(names) == 1 else None
    source = f"{state.where}: {', '.join(names)}, {back} step{'s' if back > 1 else ''} back"
    of_groups = owners(state, groups)
    found = [
        evaluated(schedulers, index, group, rate, back)
        for (schedulers, index, group), rate in zip(of_groups, current, strict=False)
    ]
    rates = [rate for rate, _ in found if rate is not None]
    if rates and len(rates) == len(found):
        verified = all(verified for _, verified in found) and scale_is_known(state, current)
        return Rate(one_rate(rates), source, APPLIED if verified else ESTIMATED)
    return _from_others(state, current[0], back)


def scale_is_known(state: TrainingState, current: Sequence[float]) -> bool:
    """Whether it is known how a ``CyclicLR`` scales, which does not show at its lowest rate.

    A user's scale function is not in the state, so other checkpoints must confirm the formula.
    """
    scheduler = state.schedulers[0]
    if len(state.schedulers) > 1 or scheduler_name(scheduler) != "CyclicLR":
        return True
    lowest = float(scheduler["base_lrs"][0])
    if not _equal(current[0], lowest):
        return True
    known = {s: rate for s, rate in state.others().items() if not _equal(rate, lowest)}
    return bool(known) and all(
        _equal(closed_form(scheduler, steps, 0, {}), rate) for steps, rate in known.items()
    )


def _from_others(state: TrainingState, current: float, back: int) -> Rate | None:
    """The rate from other checkpoints of the run, for a scheduler without a closed form."""
    scheduler = state.schedulers[0]
    if len(state.schedulers) > 1:
        return None
    known = {**state.others(), steps_taken(scheduler): current}
    bases = scheduler.get("base_lrs") if "lr_lambdas" in scheduler else None
    rate = rate_at(steps_taken(scheduler) - back, known, one_rate(bases) if bases else None)
    return rate and Rate(rate.value, f"{state.where}: {rate.source}", rate.kind)


def owners(
    state: TrainingState, groups: Sequence[State]
) -> list[tuple[Sequence[State], int, State]]:
    """For each parameter group its schedulers, its index in its optimizer, and the group."""
    if not groups:
        return [([state.schedulers[0]], i, {}) for i in range(len(state.schedulers[0]["_last_lr"]))]
    paired = len(state.optimizers) == len(state.schedulers)
    if len(state.optimizers) > 1 and not paired:
        return []
    return [
        ([state.schedulers[number]] if paired else state.schedulers, index, group)
        for number, optimizer in enumerate(state.optimizers)
        for index, group in enumerate(optimizer.get("param_groups", ()))
    ]


def evaluated(
    schedulers: Sequence[State], index: int, group: State, current: float, back: int
) -> tuple[float | None, bool]:
    """A group's rate some steps ago, and whether the same formulas give its current rate."""
    parts = [p for s in schedulers for p in s.get("_schedulers", [s]) if "_milestones" not in s]
    parts += [s for s in schedulers if "_milestones" in s]
    now = [closed_form(part, steps_taken(part), index, group) for part in parts]
    then = [closed_form(part, steps_taken(part) - back, index, group) for part in parts]
    if None in now or None in then or any(steps_taken(part) < back for part in parts):
        return None, False
    if len(parts) == 1:
        if _equal(now[0], current):
            return then[0], True
        return (current * then[0] / now[0] if now[0] else None), False  # type: ignore[operator]
    base = float(group.get("initial_lr", parts[0]["base_lrs"][index]))
    product = math.prod(float(rate or 0.0) / base for rate in now)
    if not product:
        return None, False
    # cosine schedules with a minimum rate are not factors of the rate
    verified = _equal(base * product, current)
    ratio = math.prod(float(b or 0.0) / float(a or 1.0) for a, b in zip(now, then, strict=True))
    return current * ratio, verified


def _equal(a: float | None, b: float | None) -> bool:
    return a is not None and b is not None and math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-15)


def _before_plateau(state: TrainingState, rate: float) -> Rate:
    """The rate before the last call of ``ReduceLROnPlateau``, which may have reduced it."""
    scheduler = state.schedulers[0]
    name, cooldown = f"{state.where}: ReduceLROnPlateau", scheduler.get("cooldown", 0)
    if cooldown and scheduler.get("cooldown_counter") == cooldown:
        return Rate(rate / scheduler["factor"], f"{name}, before it reduced it", ESTIMATED)
    last, others = steps_taken(scheduler), state.others()
    if last - 1 in others:
        return Rate(others[last - 1], f"{name}, the rate of the previous checkpoint", APPLIED)
    before = (other for steps, other in others.items() if steps < last)
    if cooldown or scheduler.get("num_bad_epochs") or rate in before:
        return Rate(rate, f"{name}, which did not reduce it", APPLIED)
    return Rate(rate, f"{state.where}: {NEXT}", ESTIMATED)


def steps_back(state: TrainingState) -> tuple[int, bool]:
    """How many steps ago the scheduler had the applied rate, and whether that is certain."""
    if state.back is not None:
        return state.back, True
    steps = steps_taken(state.schedulers[0])
    if steps <= 0:
        return 0, True
    taken, rest = divmod(steps, state.per_step)
    if rest:
        return 1, False
    updates = optimizer_steps(state.optimizers)
    if updates is None and state.updates is not None and state.updates >= taken:
        updates = state.updates
    number, certain = _calls_back(taken, updates, state.epochs)
    return number * state.per_step, certain


def _calls_back(taken: int, updates: int | None, epochs: Sequence[int]) -> tuple[int, bool]:
    """Whether the scheduler, called ``taken`` times, was called after the last update."""
    if updates is not None:
        if updates == taken:
            return 1, True
        if updates == taken + 1 == 2:
            return 1, False  # before the scheduler's second step, or after an epoch of two updates
        if updates == taken + 1:
            return 0, True
        if updates < taken:
            per_update, rest = divmod(taken, updates) if updates else (1, 1)
            return (1, False) if rest else (per_update, True)
        if updates % taken:
            return 0, True  # not at the end of an epoch as the scheduler counts them
    for epoch in epochs:
        if epoch == taken - 1:
            return 1, True  # counted from 0, and saved after the scheduler's step
        if epoch == taken + 1:
            return 0, True  # counted from 1, and saved before it
        if epoch == taken:
            return 1, bool(updates and updates % (taken + 1))
    # epochs are counted, but the scheduler is called at each step
    return 1, updates is None and bool(epochs) and max(epochs) < taken


def optimizer_steps(optimizers: Iterable[State]) -> int | None:
    """How many updates Adam and similar optimizers counted; None for those that do not count."""
    counts = [
        int(values["step"])
        for optimizer in optimizers
        for values in optimizer.get("state", {}).values()
        if isinstance(values, Mapping) and isinstance(values.get("step"), int | float | Tensor)
    ]
    return max(counts, default=None)
