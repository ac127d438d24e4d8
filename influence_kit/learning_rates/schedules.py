"""The usual schedules, recognised from some of their learning rates.

These are the schedules of transformers: constant, linear and cosine (also down to a minimum rate,
and with restarts), each after a linear warmup from 0. Every warmup in whole steps is tried, and
every length if it is not known; a schedule counts as recognised if all that fit agree.
"""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from influence_kit.learning_rates.rate import APPLIED, ESTIMATED, Rate

# schedules are computed in float64, and logged in full
TOLERANCE = 1e-11
MOST_STEPS = 10**7
MOST_CYCLES = 4
Known = Mapping[int, float]


class Schedules(NamedTuple):
    """Schedules of one kind, each with its warmup and length, and their minimum factor.

    ``unknowns`` is how many of their numbers were fitted to the known rates.
    """

    kind: str
    warmup: Tensor
    total: Tensor
    unknowns: int
    cycles: int = 1
    least: Tensor | float = 0.0

    def factor(self, step: int) -> Tensor:
        """The factor of the base rate after ``step`` steps."""
        done = (step - self.warmup) / (self.total - self.warmup).clamp(min=1)
        if self.kind == "linear":
            decay = (1 - done).clamp(min=0)
        elif self.kind == "cosine":
            within = torch.where(done >= 1, 1.0, (done * self.cycles) % 1)
            decay = (1 + torch.cos(math.pi * within)) / 2
        else:
            decay = torch.ones_like(self.warmup)
        decay = self.least + (1 - self.least) * decay
        return torch.where(step < self.warmup, step / self.warmup.clamp(min=1), decay)


def recognised(target: int, known: Known, base: float | None, total: int | None) -> Rate | None:
    """The rate after ``target`` steps of the schedule that fits all known rates.

    Args:
        target: the number of steps.
        known: rates by number of steps.
        base: the rate that the factor multiplies, if it is known.
        total: the length in steps, if it is known.

    Returns:
        The rate; "estimated" if several schedules fit, or if too few rates are known to confirm
        one. None if none fits.
    """
    if base is not None and all(rate == base for rate in known.values()):
        steps = sorted(known)
        # equal rates may also be the same point of a cycle, a single one the end of a warmup
        certain = math.gcd(*(step - steps[0] for step in steps)) == 1
        return Rate(base, "constant schedule", APPLIED if certain else ESTIMATED)
    found: list[tuple[float, str]] = []
    confirmed = False
    for schedules in _possible(known, base, total):
        fits, scale = _fitting(schedules, known, base)
        values = (scale * schedules.factor(target))[fits].tolist()
        name = schedules.kind + (f" with {schedules.cycles} cycles" if schedules.cycles > 1 else "")
        warmups = schedules.warmup[fits].tolist()
        found += [
            (value, f"{name} schedule, warmup of {int(warmup)} steps")
            for value, warmup in zip(values, warmups, strict=True)
        ]
        confirmed |= bool(values) and len(known) > schedules.unknowns
    if not found:
        return None
    value, source = found[0]
    spread = max(v for v, _ in found) - min(v for v, _ in found)
    if confirmed and spread <= 1e-9 * abs(value):
        return Rate(value, f"{source}, recognised from {len(known)} known rates", APPLIED)
    return None if total is None else Rate(value, f"{source}, assumed", ESTIMATED)


def _fitting(schedules: Schedules, known: Known, base: float | None) -> tuple[Tensor, Tensor]:
    """A mask of the schedules that have all known rates, and their base rates."""
    if base is None:
        largest = max(known, key=lambda step: known[step])
        scale = known[largest] / schedules.factor(largest)
    else:
        scale = torch.full_like(schedules.warmup, base)
    fits = torch.isfinite(scale) & (scale > 0)
    for step, rate in known.items():
        fits &= (scale * schedules.factor(step) - rate).abs() <= TOLERANCE * scale
    return fits, scale


def _possible(known: Known, base: float | None, total: int | None) -> Iterator[Schedules]:
    """The kinds of schedules, with all possible warmups and lengths."""
    last = max(known)
    if max(total or 0, last) > MOST_STEPS:
        return
    if total is None:
        if base is not None:
            yield from _solved(known, base)
        return
    if base is None and len(known) < 3:
        return
    unknowns = 1 if base is not None else 2
    warmup = torch.arange(max(total, last) + 1, dtype=torch.float64)
    length = torch.full_like(warmup, total)
    yield Schedules("linear", warmup, length, unknowns)
    for cycles in range(1, MOST_CYCLES + 1):
        yield Schedules("cosine", warmup, length, unknowns + (cycles > 1), cycles)
    yield Schedules("constant", warmup, length, unknowns)
    if base is not None:
        # with the minimum rate that the last known rate gives
        for kind in ("linear", "cosine"):
            plain = Schedules(kind, warmup, length, unknowns + 1).factor(last)
            least = ((known[last] / base - plain) / (1 - plain)).clamp(0, 1)
            least = torch.where(least > TOLERANCE, least, math.nan)
            yield Schedules(kind, warmup, length, unknowns + 1, least=least)


def _solved(known: Known, base: float) -> Iterator[Schedules]:
    """Schedules of unknown length: those of whole steps that fit the last rate below the base."""
    inner = [step for step, rate in known.items() if 0 < rate < base]
    warmup = torch.arange(max(known) + 1, dtype=torch.float64)
    yield Schedules("constant", warmup, torch.full_like(warmup, math.inf), 1)
    if not inner:
        return
    step = max(inner)
    factor = torch.tensor(known[step] / base, dtype=torch.float64)
    ramp = (step / factor).round().reshape(1)  # still in warmup
    yield Schedules("constant", ramp, torch.full_like(ramp, math.inf), 1)
    lengths = {
        "linear": (step - factor * warmup) / (1 - factor),
        "cosine": warmup + (step - warmup) * math.pi / torch.acos(2 * factor - 1),
    }
    for kind, length in lengths.items():
        whole = (length - length.round()).abs() <= 1e-6 * length.abs()
        possible = whole & (warmup <= step) & (length >= step)
        yield Schedules(kind, warmup[possible], length.round()[possible], 2)
