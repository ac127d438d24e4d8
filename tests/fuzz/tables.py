"""All tables of targets, by name, and how many calls each gets of so many in all."""

from collections.abc import Mapping, Sequence

from fuzz.bad_input import Target
from fuzz.damage_targets import TARGETS as DAMAGED
from fuzz.evaluation_targets import TARGETS as EVALUATION
from fuzz.folder_targets import TARGETS as CHECKPOINTS
from fuzz.method_targets import TARGETS as METHODS
from fuzz.part_targets import TARGETS as PARTS

TABLES: dict[str, Sequence[Target]] = {
    "evaluation": EVALUATION,
    "methods": METHODS,
    "parts": PARTS,
    "checkpoints": CHECKPOINTS,
    "damage": DAMAGED,
}


def calls_of(targets: Sequence[Target]) -> int:
    """How many calls there are with one bad value each."""
    return sum(len(target.good) * len(target.bad) for target in targets)


def shares(tables: Mapping[str, Sequence[Target]], calls: int) -> dict[str, float]:
    """The share of each table's calls: the same number of each table, as far as it has so many."""
    left, found = calls, {}
    by_size = sorted(tables, key=lambda name: calls_of(tables[name]))
    for done, name in enumerate(by_size):
        wanted = left / (len(by_size) - done)
        found[name] = min(1.0, wanted / calls_of(tables[name]))
        left -= found[name] * calls_of(tables[name])
    return found
