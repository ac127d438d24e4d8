"""The random state of the process: kept while something is drawn, and set to be another one."""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def kept_random_state(seed: int | None = None) -> Iterator[None]:
    """Give back the random states of torch, numpy and Python as they were.

    Args:
        seed: start inside from the states of this seed; from those that there are where None.
    """
    numpy: Any = sys.modules.get("numpy")  # what has not been imported has not been drawn from
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    own, others = random.getstate(), numpy.random.get_state() if numpy else None
    with torch.random.fork_rng(devices):
        if seed is not None:
            torch.manual_seed(seed)
            random.seed(seed)
            if numpy:
                numpy.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(own)
            if numpy:
                numpy.random.set_state(others)
