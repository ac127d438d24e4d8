"""The random states of the process, which calls of the library leave as they were."""

import random
from typing import Any

import numpy as np
import torch

# as old scripts draw: the generator that all share
NUMPY = np.random.mtrand._rand


def random_states() -> tuple[Any, ...]:
    """The states of torch, numpy and Python, to be compared."""
    return (
        torch.get_rng_state().tolist(),
        NUMPY.get_state()[1].tolist(),
        NUMPY.get_state()[2:],
        random.getstate(),
    )
