"""Methods side by side: how far they agree, how right they are, and what they cost.

Letters: m test and n training examples, K methods.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation.arrays import Values, numbers
from influence_kit.evaluation.correlation import is_constant, pearson, ranks
from influence_kit.evaluation.cost import Cost, measured
from influence_kit.evaluation.datamodel import DatamodelingScore, Kind, linear_datamodeling_score
from influence_kit.tables import text_table


class Influence(Protocol):
    """Whatever gives scores: every method of this package, and of Captum."""

    def influence(self, inputs: Any) -> Tensor:
        """Scores ``[m, n]``."""
        ...


class SubsetTruth(NamedTuple):
    """What training on subsets did: the truth of linear datamodeling scores.

    Attributes:
        subsets: which training examples each subset has, bool ``[S, n]``.
        outputs: what was measured of the test examples, ``[S, R, m]`` or ``[S, m]``.
        outputs_are: "margin" or "loss".
    """

    subsets: Values
    outputs: Values
    outputs_are: Kind


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """Methods side by side; printed as a table. ``viz.comparison`` draws it.

    Attributes:
        names: of the methods, ``[K]``.
        agreement: the mean over test examples of the rank correlation between the scores of two
            methods, ``[K, K]``.
        constant: for each method, how many test examples have the same score everywhere; their
            correlations count as 0.
        costs: of each method's ``influence``, with whatever it fits; None of given scores.
        scores: each method's linear datamodeling score; None without a truth.
    """

    names: tuple[str, ...]
    agreement: Tensor
    constant: tuple[int, ...]
    costs: tuple[Cost | None, ...]
    scores: tuple[DatamodelingScore, ...] | None

    def __repr__(self) -> str:
        header = ["", "method", "seconds", "added MiB"]
        header += [f"corr. {place}" for place in range(1, len(self.names) + 1)]
        rows = [
            [
                place + 1,
                name,
                *_shown(self.costs[place]),
                *(f"{c:.2f}" for c in self.agreement[place]),
            ]
            for place, name in enumerate(self.names)
        ]
        if self.scores is not None:
            header[2:2] = ["LDS", "std. error"]
            for row, score in zip(rows, self.scores, strict=True):
                error = score.standard_error
                row[2:2] = [f"{score.mean:.3f}", "-" if error is None else f"{error:.3f}"]
        return "\n".join([text_table(header, rows), *self._notes()])

    def _notes(self) -> list[str]:
        notes = ["corr. 1: mean rank correlation with the scores of method 1"]
        if self.scores is not None and self.scores[0].ceiling is not None:
            notes.append(f"noise ceiling of the LDS: {self.scores[0].ceiling:.2f}")
        notes += [
            f"{name}: {count} test examples of constant scores, which count as 0"
            for name, count in zip(self.names, self.constant, strict=True)
            if count
        ]
        return notes


def compare(
    methods: Mapping[str, Influence | Tensor] | Sequence[Influence],
    inputs: Any,
    truth: SubsetTruth | None = None,
    show_progress: bool = False,
) -> Comparison:
    """Rank correlation between methods, LDS where the truth is given, time and added memory.

    Each method's ``influence(inputs)`` is called once, in order, so that the time is that of a
    first call: with the fit, where the method is not fitted yet.

    Args:
        methods: by name, or a list, where each is called by its class. Scores ``[m, n]`` that are
            known already stand for a method: a baseline, say.
        inputs: the test examples: one batch, or a DataLoader that does not shuffle.
        truth: what training on subsets did to the same test examples.
        show_progress: a bar over the methods.

    Raises:
        InvalidArgumentError: for no methods, two of one name, or scores of different shapes;
            otherwise as ``linear_datamodeling_score``.

    Example:
        >>> scores = {"a": torch.tensor([[1.0, 2.0, 3.0]]), "b": torch.tensor([[1.0, 3.0, 2.0]])}
        >>> compare(scores, inputs=None).agreement
        tensor([[1.0000, 0.5000],
                [0.5000, 1.0000]], dtype=torch.float64)
    """
    named = _named(methods)
    rows: dict[str, Tensor] = {}
    costs: list[Cost | None] = []
    scores: list[DatamodelingScore] = []
    constant = []
    for name, method in tqdm(named.items(), desc="compare", disable=not show_progress):
        found, cost = _scores_of(method, inputs)
        tau = numbers(found, f"the scores of {name}", "[m, n]")
        first = next(iter(rows), name)
        if tau.shape != rows.get(first, tau).shape:
            raise InvalidArgumentError(
                f"the scores of {name} have shape {list(tau.shape)}, those of {first} "
                f"{list(rows[first].shape)}; methods are compared on the same examples"
            )
        if truth is not None:
            scores.append(linear_datamodeling_score(tau, *truth))
        costs.append(cost)
        constant.append(int(is_constant(tau).sum()))
        rows[name] = ranks(tau)
    return Comparison(
        tuple(named),
        _agreement(list(rows.values())),
        tuple(constant),
        tuple(costs),
        None if truth is None else tuple(scores),
    )


def _named(methods: Mapping[str, Any] | Sequence[Any]) -> dict[str, Any]:
    if isinstance(methods, Mapping):
        named = dict(methods)
    else:
        named = {type(method).__name__: method for method in methods}
    if len(named) != len(methods) or not named:
        names = (
            list(methods) if isinstance(methods, Mapping) else [type(m).__name__ for m in methods]
        )
        raise InvalidArgumentError(
            f"got the methods {names}; there must be at least one, and no two of one class in a "
            "list: pass {name: method}"
        )
    return named


def _scores_of(method: Any, inputs: Any) -> tuple[Any, Cost | None]:
    if isinstance(method, Tensor):
        return method, None
    return measured(lambda: method.influence(inputs))


def _agreement(rows: list[Tensor]) -> Tensor:
    values = [[float(pearson(left, right).mean()) for right in rows] for left in rows]
    return torch.tensor(values, dtype=torch.float64)


def _shown(cost: Cost | None) -> list[str]:
    if cost is None:
        return ["-", "-"]
    memory = "-" if cost.mebibytes is None else f"{cost.mebibytes:.0f}"
    return [f"{cost.seconds:.2f}", memory]
