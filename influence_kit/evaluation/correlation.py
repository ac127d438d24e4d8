"""Correlations of two matrices row by row: scores against the truth, for each test example.

Shapes: m test examples (rows), c columns (subsets, or training examples), R repeats of the truth.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation.row_mean import RowMean

Correlation = Callable[[Tensor, Tensor], Tensor]
SPLITS = 20


@dataclass(frozen=True, eq=False, repr=False)
class RowCorrelation(RowMean):
    """A correlation for each test example, and their mean.

    Attributes:
        per_test: float64 ``[m]``, from -1 to 1, without the test examples that were left out.
        constant: the number of test examples whose scores (predictions) are all equal; their
            correlation counts as 0.
        ceiling: the estimated correlation of perfect scores with the mean of R repeats; None for
            a single repeat.
        left_out: the indices of the test examples that were left out on request.
    """

    constant: int
    ceiling: float | None = None
    left_out: tuple[int, ...] = ()

    def __repr__(self) -> str:
        parts = [super().__repr__()]
        parts += [f"{self.constant} of constant scores"] * (self.constant > 0)
        parts += [f"{len(self.left_out)} left out"] * bool(self.left_out)
        parts += [] if self.ceiling is None else [f"noise ceiling {self.ceiling:.2f}"]
        return ", ".join(parts)


def row_correlations(
    predicted: Tensor,
    repeats: Tensor,
    name: str,
    leave_out_constant: bool,
    measures: Sequence[Correlation],
    noise: float = 0.0,
) -> list[RowCorrelation]:
    """The correlations of predictions with the mean of the repeats of the truth.

    Args:
        predicted: ``[m, c]``.
        repeats: the truth, ``[R, m, c]``.
        name: of the truth, for errors.
        leave_out_constant: leave out the test examples whose predictions or truths are all
            equal.
        measures: ``pearson``, ``spearman``.
        noise: rounding errors of the predictions, relative to the largest.

    Raises:
        InvalidArgumentError: for a single column, or where all values of a test example's truth are
            equal; with ``leave_out_constant``, where no test example is left.
    """
    truth = repeats.mean(dim=0)
    if truth.shape[1] < 2:
        raise InvalidArgumentError(
            f"`{name}` has {truth.shape[1]} value per test example; a correlation needs at least "
            "two"
        )
    same = is_constant(predicted, noise)
    out = torch.zeros_like(same)
    if leave_out_constant:
        out = same | is_constant(truth)
        if bool(out.all()):
            raise InvalidArgumentError(
                f"the scores or the `{name}` of each of the {len(out)} test examples are all "
                "equal; with leave_out_constant=True none is left"
            )
    else:
        _refuse_constant(truth, name)
    predicted, truth, repeats, same = predicted[~out], truth[~out], repeats[:, ~out], same[~out]
    left_out = tuple(torch.nonzero(out).flatten().tolist())
    return [
        RowCorrelation(
            measure(predicted, truth).masked_fill(same, 0.0),
            int(same.sum()),
            noise_ceiling(repeats, measure),
            left_out,
        )
        for measure in measures
    ]


def _refuse_constant(truth: Tensor, name: str) -> None:
    constant = torch.nonzero(is_constant(truth)).flatten()
    if len(constant):
        first = int(constant[0])
        raise InvalidArgumentError(
            f"in `{name}`, {len(constant)} of {len(truth)} test examples have the same value "
            f"everywhere (the first is test example {first}: {truth[first, 0].item():.6g}), so "
            "that no correlation is defined; leave them out of all arguments, or pass "
            "leave_out_constant=True"
        )


def noise_ceiling(repeats: Tensor, measure: Correlation) -> float | None:
    """The estimated correlation of the noiseless truth with the mean of its repeats ``[R, m, c]``.

    The correlation between the means of two halves of the repeats, averaged over random splits, is
    extended to all repeats by the Spearman-Brown formula; its square root is the correlation with
    the mean of infinitely many. 0 where the halves do not agree at all; None for one repeat.
    """
    r = len(repeats)
    if r < 2:
        return None
    half, generator = r // 2, torch.Generator().manual_seed(0)
    between = 0.0
    for _ in range(SPLITS):
        first, second = torch.randperm(r, generator=generator)[: 2 * half].split(half)
        sides = repeats[first].mean(dim=0), repeats[second].mean(dim=0)
        between += float(measure(*sides).mean()) / SPLITS
    if between <= 0:
        return 0.0
    times = r / half
    return float((times * between / (1 + (times - 1) * between)) ** 0.5)


def ranks(rows: Tensor) -> Tensor:
    """The ranks 1..c of the values in each row, ``[m, c]``; ties share their mean rank."""
    ordered, order = rows.sort(dim=1)
    is_first = torch.ones_like(ordered, dtype=torch.bool)
    is_first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    group = is_first.cumsum(dim=1) - 1
    rank = torch.arange(1.0, rows.shape[1] + 1, dtype=torch.float64).expand(rows.shape)
    total = torch.zeros_like(rank).scatter_add(1, group, rank)
    size = torch.zeros_like(rank).scatter_add(1, group, torch.ones_like(rank))
    shared = (total / size.clamp(min=1)).gather(1, group)
    return torch.empty_like(shared).scatter_(1, order, shared)


def is_constant(rows: Tensor, noise: float = 0.0) -> Tensor:
    """Whether all values of a row are equal, up to ``noise`` times the largest; bool ``[m]``."""
    low, high = rows.aminmax(dim=1)
    # not high - low: the difference of finite values may be infinite
    return high <= low + noise * torch.maximum(low.abs(), high.abs())


def pearson(left: Tensor, right: Tensor) -> Tensor:
    """The correlation of each row with the same row of the other matrix; 0 for constant rows."""
    products: Tensor = (_unit(left) * _unit(right)).sum(dim=1)
    return products.masked_fill(is_constant(left) | is_constant(right), 0.0).clamp(-1, 1)


def _unit(rows: Tensor) -> Tensor:
    """The rows minus their means, of norm 1."""
    # so that squares of very small or large values neither vanish nor overflow
    scaled = rows / rows.abs().amax(dim=1, keepdim=True)
    centred = scaled - scaled.mean(dim=1, keepdim=True)
    norms: Tensor = centred.norm(dim=1, keepdim=True)
    return centred / norms


def spearman(left: Tensor, right: Tensor) -> Tensor:
    """The rank correlation of each row with the same row of the other; 0 for constant rows."""
    return pearson(ranks(left), ranks(right))
