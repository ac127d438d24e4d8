"""How much memory one step may take: every chunk size in the package is computed from it."""

import os

import torch

MIB, GIB = 2**20, 2**30


def free_bytes(device: torch.device) -> int:
    """Free memory of ``device`` now, in bytes (4 GiB where the system does not report it)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not a POSIX system
        return 4 * GIB


def workspace_bytes(device: torch.device) -> int:
    """Bytes that one temporary tensor may take.

    16 MiB on a CPU: a larger one does not fit in its caches, and each new one costs page faults.
    """
    if device.type == "cuda":
        return max(64 * MIB, free_bytes(device) // 16)
    return 16 * MIB


def resident_bytes(device: torch.device) -> int:
    """Bytes that may be held for a whole pass over the training set (the test gradients)."""
    return max(64 * MIB, free_bytes(device) // 8)


def rows_within(budget: int, row_bytes: int) -> int:
    """How many rows of ``row_bytes`` bytes fit in a budget: at least one."""
    return max(1, budget // max(1, row_bytes))
