"""JSON in files of the library, which may have been damaged or forged.

Text that Python reads but cannot handle afterwards is refused: nesting beyond its recursion, whole
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
        raise ValueError("one of its objects has the same key twice")
    return found


def _whole_number(digits: str) -> int:
    # Python takes a long time to parse numbers of many digits
    if len(digits) > len(str(LARGEST)) + 1 or abs(int(digits)) > LARGEST:
        raise ValueError("it holds a whole number of more than 64 bits")
    return int(digits)
