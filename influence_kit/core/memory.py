"""How much memory one step may take: every chunk size in the package comes from here."""

import os

import torch

MIB, GIB = 2**20, 2**30


def free_bytes(device: torch.device) -> int:
    """Memory that is free on ``device`` now, in bytes (a guess of 4 GiB where nothing tells)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not a POSIX system
        return 4 * GIB


def workspace_bytes(device: torch.device) -> int:
    """What one temporary may take.

    On a CPU little: a larger one leaves the caches, and each new one costs page faults.
    """
    if device.type == "cuda":
        return max(64 * MIB, free_bytes(device) // 16)
    return 16 * MIB


def resident_bytes(device: torch.device) -> int:
    """What may be kept through a whole pass over the training set (the queries' gradients)."""
    return max(64 * MIB, free_bytes(device) // 8)


def rows_within(budget: int, row_bytes: int) -> int:
    """How many rows of ``row_bytes`` a budget holds: at least one."""
    return max(1, budget // max(1, row_bytes))
