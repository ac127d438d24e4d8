"""A fixed share of the fuzzer's questions; ``make fuzz`` asks many more."""

from typing import Any

import pytest
import torch

from fuzz.__main__ import report
from fuzz.run import Outcome, run
from influence_kit import GradCos, GradDot, TracInCP
from influence_kit.errors import InvalidArgumentError

SEEDS = range(0, 200)
AT_ONCE = 20


@pytest.mark.parametrize("first", SEEDS[::AT_ONCE])
def test_no_question_fails(first: int) -> None:
    outcomes = [run(seed) for seed in range(first, first + AT_ONCE)]
    assert [f"{o.seed}: {o.kind}: {o.what}" for o in outcomes if o.failed] == []


def simple_seeds(count: int = 3) -> list[int]:
    """Seeds whose questions about gradients pass."""
    found = []
    for seed in range(10_000):
        outcome = run(seed)
        if outcome.kind == "passed" and {"gradients", "float64"} <= {*outcome.tags, "float64"}:
            found.append(seed)
        if len(found) == count:
            return found
    raise AssertionError("no seed passes")


class TestTheFuzzerFinds:
    """What must fail: the fuzzer would be of no use if it did not."""

    @pytest.fixture(autouse=True)
    def _of_gradients(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seeds = simple_seeds()
        self.patch = monkeypatch

    def outcomes(self, change: Any) -> list[Outcome]:
        for cls in (GradDot, GradCos, TracInCP):
            for name in ("influence", "self_influence", "influence_by_layer"):
                self.patch.setattr(cls, name, change(getattr(cls, name)))
            vectors = "compute_intermediate_quantities"
            self.patch.setattr(cls, vectors, change(getattr(cls, vectors)))
        return [run(seed) for seed in self.seeds]

    def test_a_wrong_number(self) -> None:
        def change(method: Any) -> Any:
            def off(self: Any, *args: Any, **kwargs: Any) -> Any:
                found = method(self, *args, **kwargs)
                if isinstance(found, dict):
                    return {key: value * 1.001 for key, value in found.items()}
                if isinstance(found, torch.Tensor):
                    return found * 1.001
                return type(found)(found.indices, found.influence_scores * 1.001)

            return off

        assert {o.kind for o in self.outcomes(change)} == {"wrong"}

    @pytest.mark.parametrize("what", ["weight", "mode", "random state", "attribute"])
    def test_something_changed(self, what: str) -> None:
        def spoil(model: Any) -> None:
            if what == "weight":
                next(model.parameters()).data.mul_(1.0001)
            elif what == "mode":
                model.net.head.training = None
            elif what == "random state":
                torch.rand(1)
            else:
                model.note = 1

        def change(method: Any) -> Any:
            def spoiling(self: Any, *args: Any, **kwargs: Any) -> Any:
                found = method(self, *args, **kwargs)
                spoil(self.model)
                return found

            return spoiling

        assert all(o.changes for o in self.outcomes(change))

    def test_a_refusal(self) -> None:
        def change(method: Any) -> Any:
            def refusing(self: Any, *args: Any, **kwargs: Any) -> Any:
                raise InvalidArgumentError("not today")

            return refusing

        outcomes = self.outcomes(change)
        assert {o.kind for o in outcomes} <= {"error", "refused"}
        assert all(o.kind == "error" or o.excuses for o in outcomes)


def test_a_seed_asks_the_same_again() -> None:
    for seed in (3, 5, 8):
        one, other = run(seed), run(seed)
        assert (one.tags, one.kind, one.what) == (other.tags, other.kind, other.what)


def test_the_report_counts_and_names_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    report([Outcome(7, "wrong", "off by 1", ["sorted"]), Outcome(8, "passed", tags=["linear"])])
    printed = capsys.readouterr().out
    assert "1 passed, 1 failed (1 wrong, 0 changed, 0 errors), 0 refused" in printed
    assert "sorted: 1 of 1 (seeds 7): off by 1" in printed
    assert "python -m fuzz --seed 7" in printed
