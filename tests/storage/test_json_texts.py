"""JSON that Python reads, and could not handle afterwards."""

import math

import pytest

from influence_kit.storage.json_texts import parsed


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "Expecting property name"),
        (b"\xff", "utf-8"),
        (nested(34), "it is nested more than 32 deep"),
        (nested(100_000), "it is nested too deeply"),
        ('{"a":' * 40 + "1" + "}" * 40, "it is nested more than 32 deep"),
        ('{"a": [{"b": 1, "b": 2}]}', "one of its objects has the same key twice"),
        (str(2**64 + 1), "it holds a whole number of more than 64 bits"),
        (str(-(2**64) - 1), "it holds a whole number of more than 64 bits"),
        ("9" * 10**6, "it holds a whole number of more than 64 bits"),
    ],
)
def test_what_cannot_be_handled_is_refused(text: str | bytes, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        parsed(text)


def test_everything_else_is_read() -> None:
    text = '{"a": [1, -2.5, null, true, "b"], "c": {}, "d": 18446744073709551616}'
    assert parsed(text) == {"a": [1, -2.5, None, True, "b"], "c": {}, "d": 2**64}
    assert parsed("7") == 7
    assert parsed("[1e999, -Infinity]") == [math.inf, -math.inf]
    assert parsed(nested(33)) == eval(nested(33))
