"""The rate of one step of a schedule from the rates that are known at other steps.

Used where a schedule is a function that was not saved (``LambdaLR``, so all of transformers'): the
usual schedules are recognised by the rates that are known, and other ones are interpolated.
"""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from influence_kit.learning_rates.rate import APPLIED, ESTIMATED, Rate

# schedules are computed in float64, and logged in full
TOLERANCE = 1e-11
MOST_POINTS = 6
MOST_STEPS = 10**7


def rate_at(
    target: int, known: Mapping[int, float], base: float | None = None, total: int | None = None
) -> Rate | None:
    """The rate after ``target`` steps of a schedule.

    Args:
        target: the number of steps; 0 is the rate of the first step.
        known: rates by number of steps.
        base: the rate that the schedule's factor multiplies, where it is known.
        total: the length of the schedule in steps, where it is known.

    Returns:
        The rate, "applied" where it is certain: known, on a recognised schedule, or on a straight
        line with its neighbours; otherwise "estimated". None where no rate is known.
    """
    if not known or target < 0:
        return None
    if target in known:
        return Rate(known[target], f"the rate of step {target + 1} is known", APPLIED)
    below = sorted(step for step in known if step < target)
    above = sorted(step for step in known if step > target)
    chosen = {s: known[s] for s in (*below[:1], *below[-MOST_POINTS:], *above[:MOST_POINTS])}
    chosen |= {s: known[s] for s in above[-1:]}
    recognised = _recognised(target, chosen, base, total)
    if recognised is not None and recognised.kind == APPLIED:
        return recognised
    if below and above:
        return _interpolated(target, known, below, above)
    if recognised is not None:
        return recognised
    nearest = below[-1] if below else above[0]
    which = "the next step" if nearest == target + 1 else f"step {nearest + 1}, the nearest known"
    return Rate(known[nearest], f"the rate of {which}", ESTIMATED)


def _interpolated(
    target: int, known: Mapping[int, float], below: list[int], above: list[int]
) -> Rate:
    """A rate between two known ones; certain where they are equal, or in line with a third."""
    a, b = below[-1], above[0]
    value = _line(target, a, b, known)
    source = f"interpolated between the rates of steps {a + 1} and {b + 1}"
    scale = max(abs(known[a]), abs(known[b]))
    others = (*below[-2:-1], *above[1:2])
    if known[a] == known[b] or any(
        abs(_line(other, a, b, known) - known[other]) <= TOLERANCE * scale for other in others
    ):
        return Rate(value, f"{source}, a straight line", APPLIED)
    return Rate(value, source, ESTIMATED)


def _line(step: int, a: int, b: int, known: Mapping[int, float]) -> float:
    return known[a] + (known[b] - known[a]) * (step - a) / (b - a)


def _recognised(
    target: int, known: Mapping[int, float], base: float | None, total: int | None
) -> Rate | None:
    """The rate of a constant, linear or cosine schedule with warmup that fits all known rates."""
    if base is not None and all(rate == base for rate in known.values()):
        # one rate alone may also be that at the end of a warmup
        return Rate(base, "constant schedule", APPLIED if len(known) > 1 else ESTIMATED)
    found: list[tuple[float, str]] = []
    for kind, warmup, length in _schedules(known, base, total):
        factors = {step: _factor(kind, step, warmup, length) for step in known}
        if base is None:
            first = max(known, key=lambda step: known[step])
            scale = known[first] / factors[first]
        else:
            scale = torch.full_like(warmup, base)
        fits = torch.isfinite(scale) & (scale > 0)
        for step, rate in known.items():
            fits &= (scale * factors[step] - rate).abs() <= TOLERANCE * scale
        values = (scale * _factor(kind, target, warmup, length))[fits].tolist()
        places = fits.nonzero().flatten().tolist()
        found += [
            (value, f"{kind} schedule, warmup of {int(warmup[i])} steps")
            for value, i in zip(values, places, strict=True)
        ]
    if not found:
        return None
    values = [value for value, _ in found]
    value, source = found[0]
    if max(values) - min(values) <= 1e-9 * max(values):
        return Rate(value, f"{source}, recognised from {len(known)} known rates", APPLIED)
    return None if total is None else Rate(value, f"{source}, assumed", ESTIMATED)


def _factor(kind: str, step: int, warmup: Tensor, total: Tensor) -> Tensor:
    """The factor of a schedule of transformers after ``step`` steps, for every warmup and length."""
    done = (step - warmup) / (total - warmup).clamp(min=1)
    if kind == "linear":
        decay = (1 - done).clamp(min=0)
    elif kind == "cosine":
        decay = ((1 + torch.cos(math.pi * done)) / 2).clamp(min=0)
    else:
        decay = torch.ones_like(warmup)
    return torch.where(step < warmup, step / warmup.clamp(min=1), decay)


def _schedules(
    known: Mapping[int, float], base: float | None, total: int | None
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Kinds of schedules, with the warmups and lengths that are possible."""
    last = max(known)
    if max(total or 0, last) > MOST_STEPS:
        return
    if total is not None and (base is not None or len(known) > 2):
        warmup = torch.arange(max(total, last) + 1, dtype=torch.float64)
        for kind in ("linear", "cosine", "constant"):
            yield kind, warmup, torch.full_like(warmup, total)
    elif base is not None:
        yield from _solved(known, base)


def _solved(known: Mapping[int, float], base: float) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Schedules of unknown length: whole numbers of steps that fit the last rate below the base."""
    inner = [step for step, rate in known.items() if 0 < rate < base]
    warmup = torch.arange(max(known) + 1, dtype=torch.float64)
    yield "constant", warmup, torch.full_like(warmup, math.inf)
    if not inner:
        return
    step = max(inner)
    factor = torch.tensor(known[step] / base, dtype=torch.float64)
    ramp = (step / factor).round().reshape(1)  # still in warmup
    yield "constant", ramp, torch.full_like(ramp, math.inf)
    lengths = {
        "linear": (step - factor * warmup) / (1 - factor),
        "cosine": warmup + (step - warmup) * math.pi / torch.acos(2 * factor - 1),
    }
    for kind, length in lengths.items():
        whole = (length - length.round()).abs() <= 1e-6 * length.abs()
        possible = whole & (warmup <= step) & (length >= step)
        yield kind, warmup[possible], length.round()[possible]
