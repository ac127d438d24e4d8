"""How much the damping matters: a method's score at multiples of its automatic damping."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.settings.plan import Result
from benchmarks.settings.run import over_targets, truth
from benchmarks.settings.workplace import Workplace
from influence_kit.evaluation import linear_datamodeling_score


@dataclass(frozen=True)
class Variant:
    """A method with keywords of its own.

    Attributes:
        name: as ``benchmarks.settings.methods`` knows it.
        own: keywords in place of those given there.
    """

    name: str
    own: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The name and the keywords."""
        return ", ".join([self.name, *(f"{key} {value}" for key, value in self.own.items())])


def by_damping(
    workplace: Workplace, variants: Sequence[Variant], factors: Sequence[float]
) -> Iterator[Result]:
    """The linear datamodeling score at multiples of the automatic damping, or ridge.

    For methods that fit a curvature at one checkpoint.
    """
    subsets, outputs = truth(workplace)
    for variant in variants:
        methods = [
            workplace.method(variant.name, seed, **variant.own).fit()
            for seed in workplace.target_seeds
        ]
        automatic = [method.damping_used for method in methods]
        for factor in factors:
            found = []
            for method, (used, *_) in zip(methods, automatic, strict=True):
                method.damping = {block: factor * damping for block, damping in used.items()}
                scores = method.influence(workplace.data.test.tensors)
                found.append(linear_datamodeling_score(scores, subsets, outputs, "margin"))
            yield over_targets(f"{factor:g} x auto", variant.title, found, None)
