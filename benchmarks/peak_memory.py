"""The memory that a call adds to a process at its peak: for processes that do nothing else.

Changes the process: free memory is given back to the system, and the peak so far is forgotten.
"""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

from influence_kit.core.memory import MIB

# Linux keeps a process's peak here, and forgets it where "5" is written to the second
STATUS, FORGET_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def added_mebibytes(call: Callable[[], Any]) -> float | None:
    """By how much a call raises the peak of this process; None if the system does not report it."""
    gc.collect()
    _give_back_free_memory()
    try:
        FORGET_PEAK.write_text("5")
    except OSError:  # another system, or not allowed
        return None
    before = _peak()
    call()
    after = _peak()
    return None if before is None or after is None else max(0.0, after - before) / MIB


def _give_back_free_memory() -> None:
    """What malloc holds free would serve the call without raising the peak."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # another C library
        return


def _peak() -> float | None:
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    found = [float(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")]
    return found[0] if found else None
