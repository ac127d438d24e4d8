"""The differences between the description in a manifest and the current one."""

import json
import math
from collections.abc import Iterator, Mapping
from itertools import takewhile
from typing import Any, NamedTuple

LOSSES = "losses of some examples"
NORMS = "squared norms of the gradients of some examples"
# relative differences of recorded numbers that another machine's order of summation explains: for
# sums in float64, and for numbers in the model's precision; and the share of the largest of these
CLOSE = 1e-9
CLOSE_OF, FLOOR = {LOSSES: 1e-4, NORMS: 1e-3}, 1e-4
# the most characters of a value that an error shows in full
SHORT = 48


class Near(NamedTuple):
    """The largest difference of two numbers that count as equal.

    Attributes:
        share: relative to the larger one.
        floor: absolute.
    """

    share: float
    floor: float


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """The keys in which two descriptions differ, each with both values."""
    expected = json.loads(json.dumps(here))
    found = []
    for key in sorted(there.keys() | expected.keys()):
        pair, near = (there.get(key), expected.get(key)), Near(CLOSE, CLOSE)
        if key in CLOSE_OF:
            close = CLOSE_OF[key]
            near = Near(close, close * FLOOR * max(_sizes(pair[0]), default=0.0))
        if not _same(*pair, near):
            found.append(f"{key}: {_difference(*pair, near)}")
    return found


def _difference(there: Any, here: Any, near: Near) -> str:
    """Both values; for long lists, how many entries differ and the first that does."""
    texts = [json.dumps(value) for value in (there, here)]
    lists = isinstance(there, list) and isinstance(here, list)
    if not lists or max(map(len, texts)) <= SHORT:
        return f"{_excerpt(*texts)} there, {_excerpt(*reversed(texts))} here"
    pairs = list(zip(there, here, strict=False))
    wrong = [place for place, pair in enumerate(pairs) if not _same(*pair, near)]
    told = f"{len(wrong)} of {len(pairs)} entries differ"
    if len(there) != len(here):
        told = f"{len(there)} entries there, {len(here)} here"
    if not wrong:
        return told
    return f"{told} (number {wrong[0]}: {_difference(*pairs[wrong[0]], near)})"


def _excerpt(text: str, other: str) -> str:
    """A text, or if it is long, the part of it around the first difference."""
    if len(text) <= SHORT:
        return text
    alike = (a == b for a, b in zip(text, other, strict=False))
    start = max(0, sum(1 for _ in takewhile(bool, alike)) - SHORT // 4)
    stop = start + SHORT // 2
    return f"{'...' * (start > 0)}{text[start:stop]}{'...' * (stop < len(text))}"


def _sizes(value: Any) -> Iterator[float]:
    """The sizes of all finite numbers in nested lists."""
    if isinstance(value, list):
        for item in value:
            yield from _sizes(item)
    elif isinstance(value, float | int) and math.isfinite(value):
        yield abs(float(value))


def _same(left: Any, right: Any, near: Near) -> bool:
    if isinstance(left, float) or isinstance(right, float):
        numbers = isinstance(left, float | int) and isinstance(right, float | int)
        if not numbers or math.isnan(left) or math.isnan(right):
            return numbers and math.isnan(left) and math.isnan(right)
        return math.isclose(left, right, rel_tol=near.share, abs_tol=near.floor)
    if isinstance(left, list) and isinstance(right, list):
        pairs = zip(left, right, strict=False)
        return len(left) == len(right) and all(_same(a, b, near) for a, b in pairs)
    return bool(left == right)
