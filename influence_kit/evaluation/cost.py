"""What a call costs: seconds, and the GPU memory that it adds at its peak."""

import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch

from influence_kit.core.memory import MIB

Result = TypeVar("Result")


class Cost(NamedTuple):
    """The cost of one call.

    Attributes:
        seconds: wall time.
        mebibytes: by how much the memory allocated on the GPUs rose at its peak; None if no GPU
            is in use. What a call adds to the memory of a running process cannot be measured
            without changing the settings of that process: measure it in a process of its own, as
            ``benchmarks/costs.py`` does. PyTorch's peak statistics of the GPUs are reset.
    """

    seconds: float
    mebibytes: float | None


def measured(call: Callable[[], Result]) -> tuple[Result, Cost]:
    """What a call returns, and its cost."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else range(0)
    for device in devices:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    before = _peak(devices)
    start = time.perf_counter()
    result = call()
    for device in devices:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    added = max(0.0, _peak(devices) - before) / MIB
    return result, Cost(seconds, added if devices else None)


def _peak(devices: range) -> float:
    """The most bytes that were allocated on all devices together since the last reset."""
    return float(sum(torch.cuda.max_memory_allocated(device) for device in devices))
