"""Bad values for every argument: clear errors, and nothing let in."""

from collections import Counter

import torch

from fuzz.bad_input import MOST_RAW, Target, endings
from fuzz.evaluation_targets import TARGETS

SHARE = 0.04  # of all calls, as many as take a few seconds


def test_bad_input_ends_in_clear_errors():
    found = list(endings(TARGETS, seed=0, share=SHARE))
    counts = Counter(ending.kind for ending in found)
    assert counts["clear"] > 300
    assert [ending for ending in found if ending.kind in ("let in", "hung")] == []
    raw = [ending for ending in found if ending.kind == "raw"]
    assert len(raw) <= MOST_RAW * (len(found) - counts["fine"]), raw


def test_good_input_is_taken():
    for target in TARGETS:
        target.call(**{name: make() for name, make in target.good.items()})


def test_the_kinds_of_endings():
    def takes(value):
        if value is None:
            raise KeyError(value)
        return torch.zeros(2)[value]

    target = Target("takes", takes, {"value": int}, {"value": {"0", "-1"}})
    kinds = {ending.value: ending.kind for ending in endings([target])}
    assert kinds["0"] == kinds["-1"] == "fine"
    assert kinds["2"] == "raw"
    assert kinds["True"] == "let in"
