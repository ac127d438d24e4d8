"""Packages that only some settings need, imported where they are used."""

import importlib
from typing import Any

EXTRAS = {"transformers": "hf", "sklearn": "demo"}


def optional(module: str) -> Any:
    """The module of an optional package.

    Raises:
        ModuleNotFoundError: where the package is not installed, with what to install.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        extra = EXTRAS[module.partition(".")[0]]
        raise ModuleNotFoundError(f'{module} is not installed: pip install ".[{extra}]"') from error
