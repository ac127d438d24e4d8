"""The learning rate of PyTorch's schedulers at any of their steps, from their state dicts.

A state dict has no class name: its keys identify the class. ``LambdaLR`` and ``MultiplicativeLR``
do not save their functions, and ``ReduceLROnPlateau`` depends on metrics: these have no closed
form.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from typing import Any

State = Mapping[str, Any]


def closed_form(state: State, epoch: int, index: int, group: State) -> float | None:
    """The rate of parameter group ``index`` after ``epoch`` steps of the scheduler.

    Args:
        state: the scheduler's state dict.
        epoch: the number of steps, ``last_epoch`` for the current rate.
        index: the index of the parameter group.
        group: the group in the optimizer's state dict (``OneCycleLR`` stores its rates there), or
            an empty dict.

    Returns:
        The rate, or None for a scheduler without a closed form.
    """
    if "_milestones" in state:
        after = bisect_right(state["_milestones"], epoch)
        begin = state["_milestones"][after - 1] if after else 0
        return closed_form(state["_schedulers"][after], epoch - begin, index, group)
    name = scheduler_name(state)
    if name not in FORMS or index >= len(state.get("base_lrs", ())):
        return None
    try:
        return FORMS[name](state, epoch, index, group)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, ArithmeticError):
        return None  # a state of another version


def scheduler_name(state: State) -> str:
    """The name of the class of a scheduler's state dict, or "scheduler"."""
    found = (name for name, keys in NAMES.items() if all(key in state for key in keys))
    return next(found, "scheduler")


def is_scheduler(state: Any) -> bool:
    """Whether an object is a scheduler's state dict."""
    return isinstance(state, Mapping) and ("last_epoch" in state or "_schedulers" in state)


def steps_taken(state: State) -> int:
    """How many steps a scheduler has taken; a ``ChainedScheduler`` as many as its parts."""
    if "last_epoch" not in state and state.get("_schedulers"):
        return steps_taken(state["_schedulers"][0])
    taken = state.get("last_epoch", 0)
    return int(taken) if isinstance(taken, int | float) else 0


def cycles_momentum(state: State) -> bool:
    """Whether a scheduler, or a part of it, sets the momentum, too."""
    return bool(state.get("cycle_momentum")) or any(
        cycles_momentum(part) for part in state.get("_schedulers", ())
    )


def of_momentum(state: State) -> State:
    """The state of a ``OneCycleLR`` or ``CyclicLR`` with the rate replaced by the momentum."""
    if "_schedule_phases" not in state:
        # the momentum is largest where the rate is smallest
        return {**state, "base_lrs": state["max_momentums"], "max_lrs": state["base_momentums"]}
    phases = [
        {**phase, "start_lr": phase["start_momentum"], "end_lr": phase["end_momentum"]}
        for phase in state["_schedule_phases"]
    ]
    return {**state, "_schedule_phases": phases}


# the keys of each class, ordered so that the first class that fits is right
NAMES = {
    "SequentialLR": ("_milestones", "_schedulers"),
    "ChainedScheduler": ("_schedulers",),
    "ReduceLROnPlateau": ("patience", "factor"),
    "OneCycleLR": ("_schedule_phases",),
    "CyclicLR": ("max_lrs", "step_ratio"),
    "CosineAnnealingWarmRestarts": ("T_0", "T_mult"),
    "CosineAnnealingLR": ("T_max", "eta_min"),
    "LinearLR": ("start_factor", "end_factor", "total_iters"),
    "PolynomialLR": ("power", "total_iters"),
    "ConstantLR": ("factor", "total_iters"),
    "StepLR": ("step_size", "gamma"),
    "MultiStepLR": ("milestones", "gamma"),
    "LambdaLR": ("lr_lambdas",),
    "ExponentialLR": ("gamma",),
}


def _step(state: State, epoch: int, index: int, group: State) -> float:
    return float(state["base_lrs"][index] * state["gamma"] ** (epoch // state["step_size"]))


def _multi_step(state: State, epoch: int, index: int, group: State) -> float:
    passed = sum(n for milestone, n in state["milestones"].items() if milestone <= epoch)
    return float(state["base_lrs"][index] * state["gamma"] ** passed)


def _exponential(state: State, epoch: int, index: int, group: State) -> float:
    return float(state["base_lrs"][index] * state["gamma"] ** epoch)


def _constant(state: State, epoch: int, index: int, group: State) -> float:
    factor = state["factor"] if epoch < state["total_iters"] else 1.0
    return float(state["base_lrs"][index] * factor)


def _linear(state: State, epoch: int, index: int, group: State) -> float:
    start, end, total = state["start_factor"], state["end_factor"], state["total_iters"]
    return float(state["base_lrs"][index] * (start + (end - start) * min(epoch, total) / total))


def _polynomial(state: State, epoch: int, index: int, group: State) -> float:
    total = state["total_iters"]
    return float(state["base_lrs"][index] * (1 - min(epoch, total) / total) ** state["power"])


def _cosine(state: State, epoch: int, index: int, group: State) -> float:
    base, least = state["base_lrs"][index], state["eta_min"]
    return float(least + (base - least) * (1 + math.cos(math.pi * epoch / state["T_max"])) / 2)


def _warm_restarts(state: State, epoch: int, index: int, group: State) -> float:
    period, growth = state["T_0"], state["T_mult"]
    if period < 1 or growth < 1:
        raise ValueError  # periods would never reach the epoch
    if growth == 1:
        return _cosine({**state, "T_max": period}, epoch % period, index, group)
    while epoch >= period:
        epoch, period = epoch - period, period * growth
    return _cosine({**state, "T_max": period}, epoch, index, group)


def _one_cycle(state: State, epoch: int, index: int, group: State) -> float:
    begin = 0.0
    for phase in state["_schedule_phases"]:
        if epoch <= phase["end_step"] or phase is state["_schedule_phases"][-1]:
            break
        begin = phase["end_step"]
    share = (epoch - begin) / (phase["end_step"] - begin)
    start, end = group[phase["start_lr"]], group[phase["end_lr"]]
    if state["_anneal_func_type"] == "cos":
        return float(end + (start - end) / 2 * (1 + math.cos(math.pi * share)))
    return float((end - start) * share + start)


def _cyclic(state: State, epoch: int, index: int, group: State) -> float | None:
    if state.get("_scale_fn_custom") is not None or state["mode"] not in CYCLIC:
        return None
    cycle = math.floor(1 + epoch / state["total_size"])
    at, ratio = 1 + epoch / state["total_size"] - cycle, state["step_ratio"]
    share = at / ratio if at <= ratio else (at - 1) / (ratio - 1)
    low, high = state["base_lrs"][index], state["max_lrs"][index]
    scale = CYCLIC[state["mode"]](state["gamma"], cycle, epoch)
    return float(low + (high - low) * share * scale)


CYCLIC: dict[str, Callable[[float, int, int], float]] = {
    "triangular": lambda gamma, cycle, epoch: 1.0,
    "triangular2": lambda gamma, cycle, epoch: 2.0 ** (1 - cycle),
    "exp_range": lambda gamma, cycle, epoch: gamma**epoch,
}
FORMS: dict[str, Callable[[State, int, int, State], float | None]] = {
    "StepLR": _step,
    "MultiStepLR": _multi_step,
    "ExponentialLR": _exponential,
    "ConstantLR": _constant,
    "LinearLR": _linear,
    "PolynomialLR": _polynomial,
    "CosineAnnealingLR": _cosine,
    "CosineAnnealingWarmRestarts": _warm_restarts,
    "OneCycleLR": _one_cycle,
    "CyclicLR": _cyclic,
}
