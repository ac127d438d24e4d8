"""The sum of the learning rates that were applied before a checkpoint was saved."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from influence_kit.errors import InvalidArgumentError
from influence_kit.learning_rates.applied import (
    State,
    evaluated,
    owners,
    scale_is_known,
    steps_back,
)
from influence_kit.learning_rates.closed_forms import (
    closed_form,
    cycles_momentum,
    of_momentum,
    scheduler_name,
    steps_taken,
)
from influence_kit.learning_rates.interpolation import rate_at
from influence_kit.learning_rates.optimizers import gain_of, only_sgd
from influence_kit.learning_rates.rate import NONE
from influence_kit.learning_rates.training_record import TrainingRecord, record_of

# steps at which a rate between known ones is computed; between them it is interpolated linearly
POINTS = 100
# the longest run, in steps, whose schedule is searched for, which takes seconds at that length
LONG = 5000
STORE = (
    "Store 'learning_rate' (that of the last step) and 'step' (the number of optimizer steps), and "
    "'momentum' if there is some, with the weights"
)


@dataclass(frozen=True)
class RateSum:
    """The sum over steps of the learning rate over 1 - momentum.

    Args:
        value: the sum.
        steps: the number of steps.
        source: where the rates were found.
    """

    value: float
    steps: int
    source: str


def rate_sum(checkpoints: Sequence[Any], index: int) -> RateSum:
    r"""The sum of the learning rates that SGD applied until a checkpoint was saved.

    .. math::
        \sum_{t=1}^{T} \frac{\eta_t}{1 - \mu_t}

    for T steps with learning rates eta and momentum mu (with dampening, times 1 - dampening).

    It is exact if the checkpoint holds the states of ``torch.optim.SGD`` and of one of PyTorch's
    schedulers with a closed form (all but ``LambdaLR``, ``MultiplicativeLR`` and
    ``ReduceLROnPlateau``), and the scheduler is called once per step, also if it cycles the
    momentum. If the scheduler is called once per epoch, it is exact for a checkpoint saved at the
    end of an epoch (which must hold "epoch", if it was saved before the call), and otherwise up to
    one epoch's change of the rate.

    In other cases rates are known at some steps: those of the listed checkpoints, of a Trainer's
    logs, and, for a ``LambdaLR``, of neighbouring checkpoints. The schedules of transformers
    (constant, linear, cosine, after a warmup) are recognised from them, in runs of up to 5,000
    steps whose scheduler state has its base rate. Others are interpolated: straight lines between
    the known rates (the trapezoid rule), constant before the first and after the last. Each gap is
    off by at most its length times the change of the rate within it.

    Args:
        checkpoints: the checkpoints of one run: paths or dicts.
        index: the index of the one whose steps are summed.

    Raises:
        InvalidArgumentError: if the number of steps, or any rate, is not known; for optimizers
            other than SGD; if the rates of a scheduler cannot be determined; if there are no steps
            or all rates are 0.

    Example:
        >>> run = [{"learning_rate": 0.1, "step": 100}, {"learning_rate": 0.05, "step": 200}]
        >>> round(rate_sum(run, 0).value, 6), round(rate_sum(run, 1).value, 6)
        (10.0, 17.475)
    """
    own = record_of(checkpoints[index])
    only_sgd(own)
    if own.steps is None or not own.known:
        raise InvalidArgumentError(_missing(own))
    if own.steps < 1:
        raise InvalidArgumentError("it was saved after 0 steps, so there are no rates to sum")
    found = _by_schedule(own, own.steps)
    if found is None:
        others = (record_of(item) for i, item in enumerate(checkpoints) if i != index)
        found = _between(own, own.steps, [own, *others])
    if not found.value > 0 or not math.isfinite(found.value):
        raise InvalidArgumentError(
            f"the learning rates of its {own.steps} steps add up to {found.value:g} "
            f"({found.source})"
        )
    return found


def _missing(own: TrainingRecord) -> str:
    """What is missing in a record, in words."""
    lacks = ["a learning rate"] if own.rate.kind == NONE and not own.logged else []
    lacks += ["the number of optimizer steps"] if own.steps is None else []
    holds = ", ".join(own.found) or "nothing of the kind"
    epochs = " (epochs are not enough: their steps are not known)" if own.steps is None else ""
    return f"it lacks {' and '.join(lacks)}{epochs}; it holds {holds}. {STORE}"


def _by_schedule(own: TrainingRecord, steps: int) -> RateSum | None:
    """The sum from a scheduler's closed form; None if no closed form gives the current rate."""
    state = replace(own.state, updates=steps)
    current = [float(group["lr"]) for group in own.groups if "lr" in group]
    if not (state.schedulers and current) or not scale_is_known(state, current):
        return None
    back, _ = steps_back(state)
    taken = steps_taken(state.schedulers[0])
    # the number of the scheduler's calls up to the last step, and the call after it
    calls = taken if back else taken + state.per_step
    # the number of steps by the number of calls before them
    counts = Counter(step * calls // steps for step in range(steps))
    sums = []
    for (schedulers, number, group), now in zip(owners(state, own.groups), current, strict=False):
        total = 0.0
        for call, count in counts.items():
            effective = _effective(schedulers, number, group, now, taken - call)
            if effective is None:
                return None
            total += count * effective
        sums.append(total)
    if len(sums) != len(current) or not _alike(sums):
        return None
    names = ", ".join(scheduler_name(scheduler) for scheduler in state.schedulers)
    return RateSum(sums[0], steps, f"{names} at {steps} steps")


def _effective(
    schedulers: Sequence[State], number: int, group: State, rate: float, back: int
) -> float | None:
    """The rate over 1 - momentum some calls ago; None if the schedule is not certain."""
    then, verified = evaluated(schedulers, number, group, rate, back)
    if then is None or not verified:
        return None
    if not any(map(cycles_momentum, schedulers)):
        return then * gain_of([group])
    if len(schedulers) > 1 or not schedulers[0].get("cycle_momentum"):
        return None
    at = steps_taken(schedulers[0]) - back
    momentum = closed_form(of_momentum(schedulers[0]), at, number, group)
    return None if momentum is None else then * gain_of([{**group, "momentum": momentum}])


def _alike(values: Iterable[float]) -> bool:
    first, *rest = values
    return all(math.isclose(first, value, rel_tol=1e-9) for value in rest)


def _between(own: TrainingRecord, steps: int, records: Sequence[TrainingRecord]) -> RateSum:
    """The sum from rates that are known at some steps."""
    known = _known(records)
    scheduler = own.state.schedulers[0] if len(own.state.schedulers) == 1 else {}
    taken = steps_taken(scheduler) if scheduler else None
    base = None
    if "lr_lambdas" in scheduler and taken in (steps - 1, steps):
        known = {**own.state.others(), **known}
        bases = {float(rate) for rate in scheduler.get("base_lrs", ())}
        base = bases.pop() if len(bases) == 1 else None
    _refuse_unknown_schedule(own, known)
    total = own.total
    if max(steps, total or 0) > LONG:
        base = total = None
    even = torch.linspace(0, steps - 1, min(steps, POINTS)).round().long().tolist()
    points = sorted({*even, *(step for step in known if 0 <= step < steps)})
    rates = []
    for step in points:
        found = rate_at(step, known, base, total)
        assert found is not None  # because some rates are known
        rates.append(found.value)
    x, y = (torch.tensor(values, dtype=torch.float64) for values in (points, rates))
    # the trapezoid rule leaves out half of the first step and of the last
    value = float(torch.trapezoid(y, x)) + (rates[0] + rates[-1]) / 2
    source = f"interpolated between the rates known at {len(known)} of {steps} steps"
    return RateSum(value * gain_of(own.groups, own.momentum), steps, source)


def _known(records: Sequence[TrainingRecord]) -> dict[int, float]:
    """The rates known from all checkpoints, by number of steps before them."""
    found: dict[int, float] = {}
    for record in records:
        for step, rate in record.known.items():
            same = math.isclose(found.setdefault(step, rate), rate, rel_tol=1e-6)
            # the logs of old versions of transformers have the rate of the next step
            if not same and not record.logged:
                raise InvalidArgumentError(
                    f"the checkpoints have learning rates {found[step]:g} and {rate:g} in the same "
                    f"step {step + 1}, so they are not of one run; pass those of one run"
                )
    return found


def _refuse_unknown_schedule(own: TrainingRecord, known: dict[int, float]) -> None:
    """Refuse a single known rate if a scheduler has changed the rate."""
    schedulers = own.state.schedulers
    changed = bool(schedulers) or any("initial_lr" in group for group in own.groups)
    cycles = any(map(cycles_momentum, schedulers))
    if not cycles and not (changed and len(known) < 2):
        return
    names = ", ".join(scheduler_name(s) for s in schedulers) or "which was not saved"
    raise InvalidArgumentError(
        f"a scheduler ({names}) changed its learning rate{' and momentum' if cycles else ''}, and "
        f"earlier rates cannot be computed from its state, with {len(known)} rate known. "
        "Pass several checkpoints of the run, each with its 'learning_rate' and 'step'"
    )
