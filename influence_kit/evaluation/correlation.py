"""Correlations of two matrices row by row: scores against the truth, for each test example.

Letters: m test examples (rows), c columns (subsets, or training examples).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation.arrays import standard_error


@dataclass(frozen=True, eq=False, repr=False)
class RowCorrelation:
    """A correlation for each test example, and their mean.

    Attributes:
        per_test: ``[m]``, float64, from -1 to 1.
        constant: the number of test examples whose scores are all the same: they tell nothing
            apart, and their correlation counts as 0.
    """

    per_test: Tensor
    constant: int

    @property
    def mean(self) -> float:
        """The mean over test examples."""
        return float(self.per_test.mean())

    @property
    def standard_error(self) -> float | None:
        """The standard error of the mean over test examples; None for a single one."""
        error = standard_error(self.per_test)
        return None if error is None else float(error)

    def __repr__(self) -> str:
        error = "" if self.standard_error is None else f" +- {self.standard_error:.3f}"
        text = f"{self.mean:.3f}{error} over {len(self.per_test)} test examples"
        return f"{text}, {self.constant} of constant scores" if self.constant else text


def ranks(rows: Tensor) -> Tensor:
    """The ranks 1..c of the values in each row; equal ones share the mean of theirs, ``[m, c]``."""
    ordered, order = rows.sort(dim=1)
    is_first = torch.ones_like(ordered, dtype=torch.bool)
    is_first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    group = is_first.cumsum(dim=1) - 1
    place = torch.arange(1.0, rows.shape[1] + 1, dtype=torch.float64).expand(rows.shape)
    total = torch.zeros_like(place).scatter_add(1, group, place)
    size = torch.zeros_like(place).scatter_add(1, group, torch.ones_like(place))
    shared = (total / size.clamp(min=1)).gather(1, group)
    return torch.empty_like(shared).scatter_(1, order, shared)


def is_constant(rows: Tensor, noise: float = 0.0) -> Tensor:
    """Whether all values of a row are the same, up to ``noise`` times the largest; bool ``[m]``."""
    low, high = rows.aminmax(dim=1)
    return high - low <= noise * torch.maximum(low.abs(), high.abs())


def pearson(left: Tensor, right: Tensor) -> Tensor:
    """The correlation of each row of one matrix with that of the other, 0 of constant rows."""
    products: Tensor = (_unit(left) * _unit(right)).sum(dim=1)
    return products.masked_fill(is_constant(left) | is_constant(right), 0.0).clamp(-1, 1)


def _unit(rows: Tensor) -> Tensor:
    """The rows less their means, of norm 1."""
    centred = rows - rows.mean(dim=1, keepdim=True)
    # so that the squares of very small or large values stay numbers
    scaled = centred / centred.abs().amax(dim=1, keepdim=True)
    norms: Tensor = scaled.norm(dim=1, keepdim=True)
    return scaled / norms


def spearman(left: Tensor, right: Tensor) -> Tensor:
    """The rank correlation of each row of one matrix with that of the other, 0 of constant rows."""
    return pearson(ranks(left), ranks(right))


def check_truth(truth: Tensor, name: str) -> Tensor:
    """The truth ``[m, c]``, refused where a test example's values are all the same."""
    if truth.shape[1] < 2:
        raise InvalidArgumentError(
            f"`{name}` has {truth.shape[1]} value a test example; a correlation needs at least two"
        )
    constant = torch.nonzero(is_constant(truth)).flatten()
    if len(constant):
        place = int(constant[0])
        raise InvalidArgumentError(
            f"in `{name}`, {len(constant)} of {len(truth)} test examples have the same value "
            f"everywhere (the first is test example {place}: {truth[place, 0].item():.6g}), with "
            "which nothing correlates; leave them out"
        )
    return truth
