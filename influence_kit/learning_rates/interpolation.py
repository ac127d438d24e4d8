"""The learning rate at one step of a schedule, from the rates known at other steps.

It is used if a schedule is a function that was not saved (``LambdaLR``, so all schedules of
transformers): the usual schedules are recognised from the known rates, and others are interpolated.
"""

import math
from collections.abc import Mapping

from influence_kit.learning_rates.rate import APPLIED, ESTIMATED, Rate
from influence_kit.learning_rates.schedules import TOLERANCE, recognised

MOST_POINTS = 6


def rate_at(
    target: int, known: Mapping[int, float], base: float | None = None, total: int | None = None
) -> Rate | None:
    """The rate after ``target`` steps of a schedule.

    Args:
        target: the number of steps; 0 is the rate of the first step.
        known: rates by number of steps.
        base: the rate that the schedule's factor multiplies, if it is known.
        total: the length of the schedule in steps, if it is known.

    Returns:
        The rate, "applied" if it is certain: known, on a recognised schedule, or on a straight line
        with at least four neighbours; otherwise "estimated". None if no rate is known.
    """
    if not known or target < 0:
        return None
    if target in known:
        return Rate(known[target], f"the rate of step {target + 1} is known", APPLIED)
    below = sorted(step for step in known if step < target)
    above = sorted(step for step in known if step > target)
    chosen = {*below[:1], *below[-MOST_POINTS:], *above[:MOST_POINTS], *above[-1:]}
    fitted = recognised(target, {step: known[step] for step in chosen}, base, total)
    if fitted is not None and fitted.kind == APPLIED:
        return fitted
    if below and above:
        return _interpolated(target, known, below, above)
    if fitted is not None:
        return fitted
    nearest = below[-1] if below else above[0]
    which = "the next step" if nearest == target + 1 else f"step {nearest + 1}, the nearest known"
    return Rate(known[nearest], f"the rate of {which}", ESTIMATED)


def _interpolated(
    target: int, known: Mapping[int, float], below: list[int], above: list[int]
) -> Rate:
    """A rate between two known ones; certain if two more are on the same line."""
    a, b = below[-1], above[0]
    source = f"interpolated between the rates of steps {a + 1} and {b + 1}"
    scale = max(abs(known[a]), abs(known[b]))
    line = [a, b]
    for outward in (below[-2::-1], above[1:]):
        for step in outward:
            if abs(_line(step, a, b, known) - known[step]) > TOLERANCE * scale:
                break
            line.append(step)
    # three points may lie symmetrically on a curve; equal ones may be one point of several cycles
    cycle = math.gcd(*(step - a for step in line)) if known[a] == known[b] else 1
    if len(line) > 3 and cycle == 1:
        return Rate(_line(target, a, b, known), f"{source}, a straight line", APPLIED)
    return Rate(_line(target, a, b, known), source, ESTIMATED)


def _line(step: int, a: int, b: int, known: Mapping[int, float]) -> float:
    return known[a] + (known[b] - known[a]) * (step - a) / (b - a)
