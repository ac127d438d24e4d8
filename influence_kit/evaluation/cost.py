"""What a call costs: seconds, and the memory that it adds at its peak."""

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from influence_kit.core.memory import MIB

Result = TypeVar("Result")
# Linux keeps a process's peak here, and forgets it where "5" is written to the second
STATUS, FORGET_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Cost(NamedTuple):
    """The cost of one call.

    Attributes:
        seconds: of wall time.
        mebibytes: by how much memory in use rose at its peak: on the GPU where there is one in use,
            else of the process; None where nothing tells. On a GPU, memory that was held free
            is counted once it is in use; of a process it is handed back first where the C library
            can do so (glibc), and is not counted elsewhere.
    """

    seconds: float
    mebibytes: float | None


def measured(call: Callable[[], Result]) -> tuple[Result, Cost]:
    """What a call returns, and its cost."""
    gc.collect()
    on_gpu = torch.cuda.is_initialized()
    before = _start_on_gpu() if on_gpu else _start_on_cpu()
    start = time.perf_counter()
    result = call()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    after = _peak_on_gpu() if on_gpu else _peak_on_cpu()
    if before is None or after is None:
        return result, Cost(seconds, None)
    return result, Cost(seconds, max(0.0, after - before) / MIB)


def _start_on_gpu() -> float:
    torch.cuda.synchronize()
    for device in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(device)
    return _peak_on_gpu()


def _peak_on_gpu() -> float:
    return float(sum(torch.cuda.max_memory_allocated(d) for d in range(torch.cuda.device_count())))


def _start_on_cpu() -> float | None:
    _hand_back_free_memory()
    try:
        FORGET_PEAK.write_text("5")
    except OSError:  # another system, or not allowed
        return None
    return _peak_on_cpu()


def _hand_back_free_memory() -> None:
    """What malloc keeps free would serve the call without the peak's rising."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # another C library
        return


def _peak_on_cpu() -> float | None:
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    found = [float(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")]
    return found[0] if found else None
