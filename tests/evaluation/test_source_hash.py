"""The hash of a function's source: what counts, what does not, and where there is none."""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest

from influence_kit.evaluation import source_hash as module
from influence_kit.evaluation.settings import describe_function
from influence_kit.evaluation.source_hash import source_hash

# hashes of the same text by Python 3.10, 3.11, 3.12 and 3.13
TEXT = '''
def train(indices, seed: int = 3) -> "model":
    """Trains."""
    total = 0.5
    for i in indices:
        total += i * seed if i else -1
    with open("x") as f:
        pass
    try:
        names = [x for x in indices if x in {"a", "b"}
        ]
    except (OSError, ValueError) as e:
        raise RuntimeError(f"bad {e!r:>{10}} and {total:.3f}") from e
    return names, lambda y: y + total
'''
KNOWN = "69d6306a2ef69493"


def imported(folder: Path, text: str, name: str = "of_a_user"):
    file = folder / f"{name}.py"
    file.write_text(text)
    spec = importlib.util.spec_from_file_location(name, file)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def of(folder: Path, text: str, name: str = "train") -> str:
    return source_hash(getattr(imported(folder, text), name))


def test_the_hash_is_that_of_every_version_of_python(tmp_path):
    assert of(tmp_path, TEXT) == KNOWN


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"""Trains."""', '"""Says more."""'),
        ('"""Trains."""', "# nothing"),
        ("seed: int = 3", "seed = 3"),
        (' -> "model"', ""),
        ('{"a", "b"}', "{'a', 'b'}  # two"),
        ("\ndef train", "\nRATE = 2\n\n\n\ndef train"),
        ("0.5", "0.50"),
    ],
)
def test_comments_layout_and_annotations_do_not_count(tmp_path, old, new):
    assert old in TEXT
    assert of(tmp_path, TEXT.replace(old, new)) == KNOWN


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("0.5", "0.6"),
        ("i * seed", "i + seed"),
        ("seed: int = 3", "seed: int = 4"),
        ('"b"', '"c"'),
        (":.3f", ":.4f"),
        ("y + total", "y - total"),
        ("OSError", "KeyError"),
        ("total += ", "total -= "),
        ("\ndef train", "\n@(lambda made: made)\ndef train"),
    ],
)
def test_what_changes_the_result_counts(tmp_path, old, new):
    assert old in TEXT
    assert of(tmp_path, TEXT.replace(old, new)) != KNOWN


LAMBDAS = "few = [lambda x: x + 1, lambda x: (lambda x: x + 2), lambda x: x + 2]\n"


def test_lambdas_of_one_line_are_told_apart(tmp_path):
    first, second, third = imported(tmp_path, LAMBDAS).few
    assert len({source_hash(f) for f in (first, second, third)}) == 3


def test_lambdas_that_cannot_be_told_apart_go_by_their_bytecode(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_around_positions", lambda nodes, code: nodes)
    first, _, third = imported(tmp_path, LAMBDAS).few
    version = f"Python {sys.version_info[0]}.{sys.version_info[1]} bytecode: "
    assert source_hash(first).startswith(version)
    assert source_hash(first) != source_hash(third)


def test_code_without_a_source_goes_by_its_bytecode():
    made, again, other = {}, {}, {}
    exec("def train(indices, seed):\n    return 1", made)
    exec("\n\ndef train(indices, seed):\n    return 1", again)
    exec("def train(indices, seed):\n    return 2", other)
    hashes = [source_hash(found["train"]) for found in (made, again, other)]
    assert hashes[0].startswith(f"Python {sys.version_info[0]}.")
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_file_that_was_edited_since_goes_by_its_bytecode(tmp_path):
    made = imported(tmp_path, TEXT)
    assert source_hash(made.train) == KNOWN
    (tmp_path / "of_a_user.py").write_text(TEXT.replace("0.5", "0.75"))
    assert "bytecode" in source_hash(made.train)


@dataclasses.dataclass
class Rate:
    rate: float = 0.1


def test_a_class_whose_constructor_is_generated_goes_by_its_own_source():
    described = describe_function(Rate)
    assert "bytecode" not in described["code"]
    assert described == describe_function(Rate)
    assert source_hash(Rate.__init__, int).startswith("Python ")


def test_globals_within_a_comprehension_are_settings(tmp_path):
    text = "RATE = {}\ndef train(indices, seed):\n    return [RATE * i for i in indices]\n"
    first, second = (imported(tmp_path, text.format(i), f"rates{i}").train for i in (1, 2))
    assert describe_function(first)["uses"] == {"RATE": 1}
    assert describe_function(second)["uses"] == {"RATE": 2}
    assert describe_function(first)["code"] == describe_function(second)["code"]
