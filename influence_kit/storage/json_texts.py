"""JSON in the files that the library writes, which somebody else may have written after all.

What Python reads and cannot handle afterwards is refused here: nesting beyond its recursion, whole
numbers beyond the range of floats, and objects with the same key twice.
"""

import json
from typing import Any

DEEPEST = 32
# seeds have up to 64 bits
LARGEST = 2**64


def parsed(text: bytes | str) -> Any:
    """The values of a JSON text, whose lists and objects are nested at most 32 deep.

    Raises:
        ValueError: for a text that is not JSON, is nested more deeply, has the same key twice in an
            object, or a whole number of more than 64 bits.
    """
    try:
        value = json.loads(text, object_pairs_hook=_once, parse_int=_whole_number)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    inside = [value] if isinstance(value, dict | list) else []
    for _ in range(DEEPEST + 1):
        holders = [item.values() if isinstance(item, dict) else item for item in inside]
        inside = [item for held in holders for item in held if isinstance(item, dict | list)]
        if not inside:
            return value
    raise ValueError(f"it is nested more than {DEEPEST} deep")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice in one of its objects")
    return found


def _whole_number(digits: str) -> int:
    # long before the many digits that Python takes a long time for
    if len(digits) > len(str(LARGEST)) + 1 or abs(int(digits)) > LARGEST:
        raise ValueError("it holds a whole number of more than 64 bits")
    return int(digits)
