"""Restores the global random states: of torch on all devices, numpy and Python."""

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch


@dataclass(eq=False)
class _Saved:
    """The random states when a block began, and the thread that runs it."""

    states: tuple[Any, ...]
    thread: int = field(default_factory=threading.get_ident)


# the blocks that are running, in the order in which they began
_BLOCKS: list[_Saved] = []
_GUARD = threading.Lock()


@contextmanager
def same_random_states() -> Iterator[None]:
    """Numbers drawn after the block are those that would be drawn without it.

    Where blocks of several threads overlap, the last to end restores the states that the first one
    saved.
    """
    with _GUARD:
        saved = _Saved(_read())
        _BLOCKS.append(saved)
    try:
        yield
    finally:
        with _GUARD:
            was_first = _BLOCKS[0] is saved
            _BLOCKS.remove(saved)
            others = any(block.thread != saved.thread for block in _BLOCKS)
            if not others:
                _write(saved.states)
            elif was_first:
                _BLOCKS[0].states = saved.states


def _read() -> tuple[Any, ...]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    of_numpy = np.random.get_state()  # noqa: NPY002 - users' code draws from it
    return torch.get_rng_state(), cuda, mps, of_numpy, random.getstate()


def _write(states: tuple[Any, ...]) -> None:
    cpu, cuda, mps, of_numpy, of_python = states
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)
    if mps is not None:
        torch.mps.set_rng_state(mps)
    np.random.set_state(of_numpy)  # noqa: NPY002
    random.setstate(of_python)


@contextmanager
def kept_random_state(seed: int | None = None) -> Iterator[None]:
    """``same_random_states``, with a seed set inside.

    Args:
        seed: the seed set inside; with None, the states inside are the current ones.
    """
    with same_random_states():
        if seed is not None:
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002 - users' code draws from it
        yield
