"""Concrete Compressive Strength of the UCI repository (Yeh 1998), as a table of text."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.settings.readers.files import find_file
from influence_kit.errors import InvalidArgumentError

COLUMNS = 9


def read_concrete(folder: Path) -> Tensor:
    """Rows ``[n, 9]``, float64: eight measures of a mix, and its strength in MPa.

    Read is ``concrete.data``, numbers separated by blanks, in the folder or in ``uci`` below it.

    Raises:
        FileNotFoundError: where there is no such file.
        InvalidArgumentError: where it holds something else.
    """
    path = find_file(folder, ["concrete.data"], "the strength of concrete", ("uci",))
    try:
        rows = np.loadtxt(path, ndmin=2)
    except ValueError as error:
        raise InvalidArgumentError(f"{path} is not a table of numbers: {error}") from error
    if rows.shape[1] != COLUMNS or not len(rows):
        raise InvalidArgumentError(
            f"{path} has rows of {rows.shape[1]} numbers; those of the concrete data have {COLUMNS}"
        )
    return torch.from_numpy(rows)
