"""Parametrizations that take turns, where two arguments cannot fail together alone."""

from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest


def in_turn(names: str, turning: Iterable[Any], *values: Iterable[Any]) -> pytest.MarkDecorator:
    """Every combination of ``values`` once, each with one of ``turning``, which take turns.

    ``names`` is of the turning argument, then one for each of ``values``. A turn starts one later
    each time, so that the same two do not always meet.
    """
    every = list(turning)
    rows = list(product(*values))
    assert len(rows) >= len(every), "not every one gets a turn"
    turns = [every[(place + place // len(every)) % len(every)] for place in range(len(rows))]
    return pytest.mark.parametrize(
        names, [(turn, *row) for turn, row in zip(turns, rows, strict=True)]
    )
