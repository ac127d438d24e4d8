"""In which parts the description in a manifest differs from what is described now."""

import json
import math
from collections.abc import Mapping
from itertools import takewhile
from typing import Any

LOSSES = "losses of the first examples"
# relative differences of recorded numbers that another machine's order of summation explains: of
# sums in float64, and of losses in the model's precision
CLOSE, CLOSE_LOSSES = 1e-9, 1e-4
# characters of a value that an error shows whole
SHORT = 48


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """The keys in which a manifest differs from what is described here, each with both values."""
    expected = json.loads(json.dumps(here))
    found = []
    for key in sorted(there.keys() | expected.keys()):
        pair, close = (there.get(key), expected.get(key)), CLOSE_LOSSES if key == LOSSES else CLOSE
        if not _same(*pair, close):
            found.append(f"{key}: {_difference(*pair, close)}")
    return found


def _difference(there: Any, here: Any, close: float) -> str:
    """Both values; of long lists how many entries differ, and the first that does."""
    texts = [json.dumps(value) for value in (there, here)]
    lists = isinstance(there, list) and isinstance(here, list)
    if not lists or max(map(len, texts)) <= SHORT:
        return f"{_excerpt(*texts)} there, {_excerpt(*reversed(texts))} here"
    pairs = list(zip(there, here, strict=False))
    wrong = [place for place, pair in enumerate(pairs) if not _same(*pair, close)]
    told = f"{len(wrong)} of {len(pairs)} entries differ"
    if len(there) != len(here):
        told = f"{len(there)} entries there, {len(here)} here"
    if not wrong:
        return told
    return f"{told} (number {wrong[0]}: {_difference(*pairs[wrong[0]], close)})"


def _excerpt(text: str, other: str) -> str:
    """A text, or a part of it from a little before it leaves the other."""
    if len(text) <= SHORT:
        return text
    alike = (a == b for a, b in zip(text, other, strict=False))
    start = max(0, sum(1 for _ in takewhile(bool, alike)) - SHORT // 4)
    stop = start + SHORT // 2
    return f"{'...' * (start > 0)}{text[start:stop]}{'...' * (stop < len(text))}"


def _same(left: Any, right: Any, close: float) -> bool:
    if isinstance(left, float) or isinstance(right, float):
        numbers = isinstance(left, float | int) and isinstance(right, float | int)
        if not numbers or math.isnan(left) or math.isnan(right):
            return numbers and math.isnan(left) and math.isnan(right)
        return math.isclose(left, right, rel_tol=close, abs_tol=close)
    if isinstance(left, list) and isinstance(right, list):
        pairs = zip(left, right, strict=False)
        return len(left) == len(right) and all(_same(a, b, close) for a, b in pairs)
    return bool(left == right)
