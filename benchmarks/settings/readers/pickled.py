"""Pickled numpy arrays, read without running code that the file names.

A pickle may call anything. Here it may call what numpy arrays of numbers are made of, and no more.
"""

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from influence_kit.errors import InvalidArgumentError


def _latin1(text: str, encoding: str) -> bytes:
    """How Python 3 pickles bytes for Python 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes encoded as {encoding}")
    return text.encode("latin1")


_RECONSTRUCT = np.zeros(0, np.uint8).__reduce__()[0]
# by the names that numpy 1 and numpy 2 write
ALLOWED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("_codecs", "encode"): _latin1,
}


class ArrayUnpickler(pickle.Unpickler):
    """Reads numbers, strings, lists, dicts and numpy arrays; refuses every other class."""

    def find_class(self, module: str, name: str) -> Any:
        """What the file calls by name, if arrays are made of it."""
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array needs")
        return ALLOWED[module, name]


def read_pickled_arrays(path: Path) -> Any:
    """What a pickle holds; strings that Python 2 wrote come as bytes.

    Raises:
        InvalidArgumentError: for a file that is no pickle, or asks for anything but arrays.
    """
    try:
        with path.open("rb") as file:
            return ArrayUnpickler(file, encoding="bytes").load()
    except Exception as error:  # a damaged pickle may raise any exception (Python's documentation)
        raise InvalidArgumentError(f"{path} cannot be read as pickled arrays: {error}") from error
