"""Damping chosen by the linear datamodeling score, on data held out for tuning."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from influence_kit.core.arguments import check_sequence, check_text, shown
from influence_kit.core.tables import text_table
from influence_kit.errors import DampingWarning, InvalidArgumentError
from influence_kit.evaluation.arrays import Values, as_tensor
from influence_kit.evaluation.correlation import RowCorrelation
from influence_kit.evaluation.datamodel import Kind, linear_datamodeling_score
from influence_kit.evaluation.method_comparison import Influence

ATTRIBUTES = ("damping", "ridge")


@dataclass(frozen=True, eq=False, repr=False)
class Tuned:
    """The values that were tried; printed as a table.

    Attributes:
        attribute: the attribute that was tuned: "damping" or "ridge".
        value: the one with the highest score (the first of equal ones), now set on the method.
        values: all that were tried.
        scores: the linear datamodeling score of each on the tuning data.
    """

    attribute: str
    value: Any
    values: tuple[Any, ...]
    scores: tuple[RowCorrelation, ...]

    @property
    def is_at_edge(self) -> bool:
        """Whether the best value is the smallest or largest one tried: then try more beyond it."""
        numeric = [value for value in self.values if isinstance(value, int | float)]
        return len(numeric) > 1 and self.value in (min(numeric), max(numeric))

    def __repr__(self) -> str:
        rows = [
            [value, *score.cells(), "chosen" if value == self.value else ""]
            for value, score in zip(self.values, self.scores, strict=True)
        ]
        table = text_table([self.attribute, "LDS", "std. error", ""], rows)
        edge = "the best value is the smallest or largest one tried: try more beyond it"
        return f"{table}\n{edge}" if self.is_at_edge else table


def tune_damping(
    method: Influence,
    values: Sequence[Any],
    subsets: Values,
    outputs: Values,
    inputs: Any,
    outputs_are: Kind,
    attribute: str | None = None,
) -> Tuned:
    """The damping (or ridge) with the highest linear datamodeling score on tuning data.

    The chosen value is set on the method; after an error, the old value is restored. A value looks
    better than it is on the test examples that it was chosen on: use test examples, and preferably
    also subsets, for tuning alone, and report results on others.

    Setting the value does not fit a method of this package again: the cost is one fit, and one call
    of ``influence`` per value.

    Args:
        method: with ``influence`` and an attribute ``damping`` or ``ridge``.
        values: the values to try: numbers, "auto", or whatever the attribute takes.
        subsets: the tuning subsets, bool ``[S, n]``.
        outputs: what was measured of the tuning test examples in the models trained on these
            subsets, ``[S, m]`` or ``[S, R, m]``.
        inputs: the tuning test examples.
        outputs_are: "margin" or "loss".
        attribute: what to tune; None for the one of ``damping`` and ``ridge`` that the method has.

    Raises:
        InvalidArgumentError: for no values, or a method without the attribute (or with both);
            otherwise as ``linear_datamodeling_score``.
    """
    values = [_one_value(value) for value in check_sequence(values, "values", "dampings to try")]
    if len(values) == 0:
        raise InvalidArgumentError("`values` is empty; pass one or more dampings to try")
    if not callable(getattr(method, "influence", None)):
        raise InvalidArgumentError(
            "`method` must have `influence(inputs)`, as methods of this package; got "
            f"{shown(method)}"
        )
    if attribute is not None:
        check_text(attribute, "attribute", instead="None")
    attribute = _attribute(method, attribute)
    before = getattr(method, attribute)
    scores = []
    try:
        for value in values:
            setattr(method, attribute, value)
            with warnings.catch_warnings():
                # extreme values are tried on purpose
                warnings.simplefilter("ignore", DampingWarning)
                found = method.influence(inputs)
            scores.append(linear_datamodeling_score(found, subsets, outputs, outputs_are))
    except BaseException:
        setattr(method, attribute, before)
        raise
    best = max(range(len(values)), key=lambda index: scores[index].mean)
    setattr(method, attribute, values[best])
    return Tuned(attribute, values[best], tuple(values), tuple(scores))


def _one_value(value: Any) -> Any:
    """A value to try; of a tensor or array its one number."""
    if not isinstance(value, Tensor | np.ndarray):
        return value
    numbers = as_tensor(value, "an item of `values`", "one number")
    if numbers.numel() != 1:
        raise InvalidArgumentError(
            f"an item of `values` has shape {list(numbers.shape)}; each must be one value to try"
        )
    return numbers.item()


def _attribute(method: Any, asked: str | None) -> str:
    wanted = ATTRIBUTES if asked is None else (asked,)
    there = [name for name in wanted if hasattr(method, name)]
    if len(there) != 1:
        raise InvalidArgumentError(
            f"a {type(method).__name__} has {there or 'none'} of the attributes {list(wanted)}; "
            "pass the name of the one to tune as `attribute`"
        )
    return there[0]
