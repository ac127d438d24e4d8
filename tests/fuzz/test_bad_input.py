"""Bad values for every argument: clear errors, and nothing let in."""

from collections import Counter

import pytest
import torch

from fuzz.bad_input import BADLY, MOST_RAW, Changed, Target, endings
from fuzz.evaluation_targets import TARGETS
from fuzz.folder_targets import TARGETS as FOLDERS
from fuzz.method_targets import TARGETS as METHODS
from fuzz.method_targets import unchanged

# of all calls, as many as take a few seconds, and how many of them at least end in a clear error
SHARES = {
    "evaluation": (TARGETS, 0.04, 300),
    "methods": (METHODS, 0.006, 200),
    "folders": (FOLDERS, 0.05, 80),
}


@pytest.mark.parametrize("part", SHARES)
def test_bad_input_ends_in_clear_errors(part):
    targets, share, least = SHARES[part]
    found = list(endings(targets, seed=0, share=share))
    counts = Counter(ending.kind for ending in found)
    assert counts["clear"] > least
    assert [ending for ending in found if ending.kind in BADLY] == []
    raw = [ending for ending in found if ending.kind == "raw"]
    assert len(raw) <= MOST_RAW * (len(found) - counts["fine"]), raw


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("targets", [TARGETS, METHODS[::3], FOLDERS], ids=SHARES)
def test_good_input_is_taken(targets):
    for target in targets:
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


def test_a_call_that_changes_what_it_was_given_is_noticed():
    model = torch.nn.Linear(2, 2)
    with pytest.raises(Changed, match="model"), unchanged({"model": model}):
        model.eval()
