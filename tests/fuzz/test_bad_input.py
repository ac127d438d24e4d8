"""Bad values for every argument, and damaged folders: clear errors, and nothing let in."""

import os
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from fuzz.bad_input import BADLY, MOST_RAW, Target, endings
from fuzz.bad_values import BAD
from fuzz.tables import TABLES, calls_of, shares
from fuzz.watch import Changed, Hung, LetIn, TooLarge, unchanged, watched

# of each table about as many calls, and how many of them at least end in a clear error
CALLS, LEAST = 250, {"damage": 75, "checkpoints": 40}


@pytest.mark.parametrize("table", TABLES)
def test_bad_input_ends_in_clear_errors(table):
    targets = TABLES[table]
    found = list(endings(targets, seed=0, share=CALLS / calls_of(targets)))
    counts = Counter(ending.kind for ending in found)
    assert counts["clear"] > LEAST.get(table, 150)
    assert [ending for ending in found if ending.kind in BADLY] == []
    raw = [ending for ending in found if ending.kind == "raw"]
    assert len(raw) <= MOST_RAW * (len(found) - counts["fine"]), raw


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("table", TABLES)
def test_good_input_is_taken(table):
    for target in TABLES[table][:: 3 if table == "methods" else 1]:
        given = {name: make() for name, make in target.good.items()}
        with watched(given, target.changed):
            target.call(**given)


def test_the_calls_are_shared_by_the_tables():
    one = Target("one", print, {"a": int}, bad=dict.fromkeys(range(10)))
    more = Target("more", print, {"a": int, "b": int}, bad=dict.fromkeys(range(100)))
    assert shares({"more": [more], "one": [one]}, 60) == {"one": 1.0, "more": 0.25}
    assert shares({"more": [more], "one": [one]}, 10**6) == {"one": 1.0, "more": 1.0}


# The harness notices what it is there for.


def kinds_of(call, **given):
    found = endings([Target("one", call, {"value": int}, **given)])
    return {ending.value: ending.kind for ending in found}


def test_the_kinds_of_endings():
    def takes(value):
        if value is None:
            raise KeyError(value)
        return torch.zeros(2)[value]

    kinds = kinds_of(takes, fine={"value": {"0", "-1"}})
    assert kinds["0"] == kinds["-1"] == "fine"
    assert kinds["2"] == "raw"
    assert kinds["True"] == "let in"
    assert len(kinds) == len(BAD)


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (lambda value: value.append(1), "changed"),
        (lambda value: torch.rand(2), "changed"),
        (lambda value: Path("thesis.part").unlink(), "changed"),
        (lambda value: os.truncate("manifest.json", 0), "changed"),
        (lambda value: torch.ones(2**25), "too large"),
        (lambda value: torch.zeros(2**60), "too large"),
        (lambda value: time.sleep(60), "hung"),
        (lambda value: all(True for _ in iter(int, 1)), "hung"),
    ],
)
def test_what_is_worse_than_an_error(call, kind, monkeypatch):
    monkeypatch.setattr("fuzz.watch.LIMIT", 1)
    monkeypatch.setattr("fuzz.watch.PATIENCE", 5)
    monkeypatch.setattr("fuzz.watch.MOST_MEMORY", 2**26)
    assert kinds_of(call, bad={"a list": list}) == {"a list": kind}


def test_a_call_that_changes_what_it_was_given_is_noticed():
    model = torch.nn.Linear(2, 2)
    with pytest.raises(Changed, match="model"), unchanged({"model": model}):
        model.eval()


def test_what_is_worse_goes_first():
    def worst(worse):
        with watched({"x": [1]}):
            torch.rand(2)
            raise worse

    for worse in (Hung, LetIn, TooLarge):
        with pytest.raises(worse):
            worst(worse)
    with pytest.raises(Changed, match="the random state"):
        worst(ValueError)
