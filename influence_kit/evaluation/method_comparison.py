"""Methods side by side: how far they agree, how well they predict retraining, what they cost.

Shapes: m test examples, n training examples, K methods.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from influence_kit.core.arguments import check_flag, check_mapping, shown
from influence_kit.core.tables import text_table
from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation.arrays import Values, numbers
from influence_kit.evaluation.correlation import (
    RowCorrelation,
    is_constant,
    pearson,
    ranks,
)
from influence_kit.evaluation.cost import Cost, measured
from influence_kit.evaluation.datamodel import Kind, linear_datamodeling_score

# correlations per line of a table: as many as fit into 80 characters
COLUMNS = 10


class Influence(Protocol):
    """Any object that gives scores: every method of this package, and of Captum."""

    def influence(self, inputs: Any) -> Tensor:
        """Scores ``[m, n]``."""
        ...


class SubsetTruth(NamedTuple):
    """What training on subsets gave: the ground truth of linear datamodeling scores.

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
        costs: of each method's ``influence``, including the fit; None for given scores.
        scores: each method's linear datamodeling score; None without a truth.
    """

    names: tuple[str, ...]
    agreement: Tensor
    constant: tuple[int, ...]
    costs: tuple[Cost | None, ...]
    scores: tuple[RowCorrelation, ...] | None

    def __repr__(self) -> str:
        title = "mean rank correlation of the scores:"
        return "\n".join([self._methods(), *self._notes(), "", title, *self._correlations()])

    def _methods(self) -> str:
        header = ["", "method", "seconds"]
        rows: list[list[object]] = [
            [number, name, "-" if cost is None else f"{cost.seconds:.2f}"]
            for number, (name, cost) in enumerate(zip(self.names, self.costs, strict=True), 1)
        ]
        memory = [None if cost is None else cost.mebibytes for cost in self.costs]
        if any(size is not None for size in memory):
            header.append("added MiB")
            for row, size in zip(rows, memory, strict=True):
                row.append("-" if size is None else f"{size:.0f}")
        if self.scores is not None:
            header[2:2] = ["LDS", "std. error"]
            for row, score in zip(rows, self.scores, strict=True):
                row[2:2] = score.cells()
        return text_table(header, rows)

    def _notes(self) -> list[str]:
        ceiling = None if self.scores is None else self.scores[0].ceiling
        notes = [] if ceiling is None else [f"noise ceiling of the LDS: {ceiling:.2f}"]
        return notes + [
            f"{name}: {count} test examples of constant scores, which count as 0"
            for name, count in zip(self.names, self.constant, strict=True)
            if count
        ]

    def _correlations(self) -> Iterator[str]:
        """The agreement in tables of some columns each; methods by their numbers."""
        count = len(self.names)
        for start in range(0, count, COLUMNS):
            some = slice(start, start + COLUMNS)
            rows = [
                [number, *(f"{value:.2f}" for value in row[some])]
                for number, row in enumerate(self.agreement.tolist(), 1)
            ]
            yield text_table(["", *map(str, range(1, count + 1)[some])], rows)


def compare(
    methods: Mapping[str, Influence | Tensor] | Sequence[Influence],
    inputs: Any,
    truth: SubsetTruth | None = None,
    show_progress: bool = False,
) -> Comparison:
    """Rank correlation between methods, LDS where the truth is given, time, and memory on a GPU.

    Each method's ``influence(inputs)`` is called once, in order, so the time is that of a first
    call, including the fit where the method is not fitted yet.

    Args:
        methods: by name, or a list, where each is named after its class. Known scores ``[m, n]``,
            such as those of a baseline, may take the place of a method.
        inputs: the test examples: one batch, or a DataLoader that does not shuffle.
        truth: what training on subsets gave for the same test examples.
        show_progress: a progress bar over the methods.

    Raises:
        InvalidArgumentError: for no methods, two of one name, or scores of different shapes;
            otherwise as ``linear_datamodeling_score``.

    Example:
        >>> scores = {"a": torch.tensor([[1.0, 2.0, 3.0]]), "b": torch.tensor([[1.0, 3.0, 2.0]])}
        >>> compare(scores, inputs=None).agreement
        tensor([[1.0000, 0.5000],
                [0.5000, 1.0000]], dtype=torch.float64)
    """
    check_flag(show_progress, "show_progress")
    named, truth = _named(methods), _checked_truth(truth)
    rows: dict[str, _Scored] = {}
    for name, method in tqdm(named.items(), desc="compare", disable=not show_progress):
        rows[name] = row = _row_of(name, method, inputs, truth)
        first = next(iter(rows))
        if row.ranks.shape != rows[first].ranks.shape:
            raise InvalidArgumentError(
                f"the scores of {name} have shape {list(row.ranks.shape)}, those of {first} "
                f"{list(rows[first].ranks.shape)}; methods are compared on the same examples"
            )
    found = rows.values()
    return Comparison(
        tuple(rows),
        _agreement([row.ranks for row in found]),
        tuple(row.constant for row in found),
        tuple(row.cost for row in found),
        None if truth is None else tuple(row.score for row in found if row.score is not None),
    )


class _Scored(NamedTuple):
    """The scores of one method, as the comparison keeps them."""

    ranks: Tensor
    constant: int
    cost: Cost | None
    score: RowCorrelation | None


def _row_of(name: str, method: Any, inputs: Any, truth: SubsetTruth | None) -> _Scored:
    scores: Any
    if isinstance(method, Tensor | np.ndarray):
        scores, cost = method, None
    elif not callable(getattr(method, "influence", None)):
        raise InvalidArgumentError(
            f"the method {name} is {shown(method)}; expected scores [m, n], or an object with "
            "`influence(inputs)`"
        )
    else:
        scores, cost = measured(lambda: method.influence(inputs))
    tau = numbers(scores, f"the scores of {name}", "[m, n]")
    score = None if truth is None else linear_datamodeling_score(tau, *truth)
    return _Scored(ranks(tau), int(is_constant(tau).sum()), cost, score)


def _checked_truth(truth: Any) -> SubsetTruth | None:
    if truth is None:
        return None
    if not isinstance(truth, tuple) or len(truth) != len(SubsetTruth._fields):
        raise InvalidArgumentError(
            f"`truth` must be a SubsetTruth(subsets, outputs, outputs_are); got {shown(truth)}"
        )
    return SubsetTruth(*truth)


def _named(methods: Any) -> dict[str, Any]:
    if isinstance(methods, Mapping):
        pairs = list(check_mapping(methods, "methods", "{name: method}").items())
    elif isinstance(methods, list | tuple):
        pairs = [(type(method).__name__, method) for method in methods]
    else:
        raise InvalidArgumentError(
            f"`methods` must be a dict {{name: method}}, or a list of methods; got {shown(methods)}"
        )
    named = dict(pairs)
    if not named or len(named) < len(pairs):
        raise InvalidArgumentError(
            f"got the methods {[name for name, _ in pairs]}; there must be at least one, and no "
            "two of the same class in a list: pass {name: method}"
        )
    return named


def _agreement(rows: Sequence[Tensor]) -> Tensor:
    values = [[float(pearson(left, right).mean()) for right in rows] for left in rows]
    return torch.tensor(values, dtype=torch.float64)
