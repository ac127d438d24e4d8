"""The number N of observations of a training set, in the units of a loss.

The negative log-likelihood of a training set is a sum over its labels; the curvature C of an
influence function is that of the mean over examples of a loss in any units: the mean over the
tokens of each, or a squared error. N times C is the curvature of the negative log-likelihood.

Shapes: n examples of a batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from influence_kit.core.distributed import is_first_rank, sum_over_ranks


@dataclass(frozen=True)
class LabelStatistics:
    """Statistics of the labels of a batch.

    Args:
        labels: the number of labels that count.
        squares: the sum over labels of the squared factor between the loss and the negative
            log-likelihood (1 / T for a mean over T tokens).
        residuals: the sum over labels of the squared error over the variance at which the loss is a
            negative log-likelihood; None if the likelihood has no variance.
    """

    labels: Tensor
    squares: Tensor
    residuals: Tensor | None


@dataclass(frozen=True)
class Observations:
    """The number N of observations of a training set.

    Args:
        count: N; if a variance is estimated, N at the mean squared error.
        values: the number of predicted values if their variance is estimated, so that N is
            ``count * (1 - gamma / values)`` when gamma parameters fit them; infinite if the
            likelihood has no variance.
    """

    count: float
    values: float = math.inf

    @staticmethod
    def of(totals: Tensor, n: int) -> Observations:
        """The observations of ``n`` training examples, given the result of ``Tally.result``."""
        count, values = totals.tolist()
        return Observations(n * count, n * values)


def curvature_factor(totals: Tensor, of_data: bool) -> float:
    """The curvature of the mean loss, over the mean of the outer products of its gradients.

    T for a mean over T tokens. Labels of the data are assumed to be distributed as the model
    predicts.

    Args:
        totals: the result of ``Tally.result``.
        of_data: whether gradients were taken at the labels of the data.
    """
    count, values = totals.tolist()
    # slopes sampled with the variance at which the loss is -log likelihood are in its units
    return math.sqrt(count) if math.isinf(values) or of_data else 1.0


# the entries of ``Tally.result``
TOTALS = ("count", "values")
SUMS = ("examples", "labels", "squares", "residuals", "with_variance", "unknown")


class Tally:
    """Sums over the batches of a pass; a batch that is added twice counts once.

    Args:
        of_data: whether gradients are taken at the labels of the data, not at sampled slopes.
    """

    def __init__(self, of_data: bool) -> None:
        self.of_data = of_data
        self._parts: dict[int, Tensor] = {}

    def add(self, start: int, n: int, statistics: LabelStatistics | None) -> None:
        """Add a batch.

        Args:
            start: index of the first example.
            n: the number of examples.
            statistics: of the labels; None if the loss is not a known likelihood.
        """
        own: dict[str, Tensor | float] = dict.fromkeys(SUMS, 0.0)
        own["examples"] = n
        if statistics is None:
            own["unknown"] = 1.0
        else:
            own |= {"labels": statistics.labels, "squares": statistics.squares}
            if statistics.residuals is not None:
                own |= {"residuals": statistics.residuals, "with_variance": 1.0}
        self._parts[start] = torch.tensor([float(own[name]) for name in SUMS], dtype=torch.float64)

    def result(self, sample: Tensor) -> Tensor:
        """N and the number of values with a variance, per example: ``[2]``.

        If the loss is not a known likelihood, each example is one observation.
        """
        total = sample.new_zeros(len(SUMS), dtype=torch.float64)
        for start, own in self._parts.items():
            if start or is_first_rank():  # all ranks read the first batch
                total += own.to(total)
        of = dict(zip(SUMS, sum_over_ranks(total).tolist(), strict=True))
        if of["unknown"]:
            return torch.tensor([1.0, math.inf], dtype=torch.float64)
        values = of["labels"] / of["examples"] if of["with_variance"] else math.inf
        scale = of["residuals"] if of["with_variance"] else of["squares"]
        count = of["labels"] / scale if scale else math.inf
        if self.of_data and of["with_variance"]:
            count *= count  # the labels have the variance of the errors, not that of the loss
        return torch.tensor([count, values], dtype=torch.float64)
