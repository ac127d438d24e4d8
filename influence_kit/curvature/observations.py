"""As how many observations a training set counts, in the units of a loss.

The negative log-likelihood of a training set is a sum over its labels, the curvature C of an
influence function the mean over examples of a loss in any units: the mean over the tokens of each,
or a squared error. N times C is the curvature of the negative log-likelihood.

Shapes: n examples of a batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from influence_kit.core.distributed import is_first_rank, sum_over_ranks
from influence_kit.gradients.per_example import Gradients


@dataclass(frozen=True)
class LabelStatistics:
    """What the labels of a batch say.

    Args:
        labels: how many labels count.
        squares: the sum over labels of the squared factor between the loss and the negative
            log-likelihood (1 / T for a mean over T tokens).
        residuals: the sum over labels of the squared error over the variance at which the loss is a
            negative log-likelihood; None where the likelihood has no variance.
        weights: of each example ``[n]``: the squared slope that its labels have on average, over
            that of the labels it has.
    """

    labels: Tensor
    squares: Tensor
    residuals: Tensor | None
    weights: Tensor


@dataclass(frozen=True)
class Observations:
    """N of a training set.

    Args:
        count: N; where a variance is estimated, N at the mean squared error.
        values: how many numbers were predicted with a variance that is estimated, so that N is
            ``count * (1 - gamma / values)`` where gamma parameters fit them; infinite where the
            likelihood has no variance.
    """

    count: float
    values: float = math.inf

    @staticmethod
    def of(totals: Tensor, n: int) -> Observations:
        """Of ``n`` training examples, given what ``Tally.result`` found."""
        count, values, excess = totals.tolist()
        return Observations(n * count * excess, n * values)


def curvature_factor(totals: Tensor, of_data: bool) -> float:
    """The curvature of the mean loss, over the mean of the outer products of its gradients.

    T times the excess for a mean over T tokens; for outer products at the labels of the data,
    which are taken for as likely as the model has them, without the excess.

    Args:
        totals: what ``Tally.result`` found.
        of_data: whether gradients were taken at the labels of the data.
    """
    count, values, excess = totals.tolist()
    # labels drawn with the variance at which the loss is -log likelihood are in its units
    return float(excess * (math.sqrt(count) if math.isinf(values) or of_data else 1.0))


SUMS = (
    "examples",
    "labels",
    "squares",
    "residuals",
    "with_variance",
    "seen",
    "expected",
    "unknown",
)


class Tally:
    """Sums over the batches of a pass; a batch that comes twice counts once.

    Args:
        of_data: whether gradients are taken at the labels of the data, not at drawn ones.
    """

    def __init__(self, of_data: bool) -> None:
        self.of_data = of_data
        self._parts: dict[int, Tensor] = {}

    def add(self, start: int, statistics: LabelStatistics | None, gradients: Gradients) -> None:
        """Take the batch whose first example stands at ``start``.

        A label that the model thinks unlikely is drawn rarely, and its gradient is large: of a
        confident model a few draws have nearly all of the curvature, or none came. Each example's
        squared gradient times its weight is what it would be on average over labels.

        Args:
            start: index of the first example.
            statistics: of the labels; None where the loss is no known likelihood.
            gradients: of the examples.
        """
        squares = gradients.squared_norms().double()
        own: dict[str, Tensor | float] = dict.fromkeys(SUMS, 0.0)
        own["examples"] = gradients.n
        if statistics is None:
            own["unknown"] = 1.0
        else:
            own |= {"labels": statistics.labels, "squares": statistics.squares}
            own |= {"seen": squares.sum(), "expected": squares @ statistics.weights}
            if statistics.residuals is not None:
                own |= {"residuals": statistics.residuals, "with_variance": 1.0}
        self._parts[start] = torch.stack(
            [
                torch.as_tensor(own[name], dtype=torch.float64, device=squares.device)
                for name in SUMS
            ]
        )

    def result(self, sample: Tensor) -> Tensor:
        """N and the values with a variance, for each example, and the curvature's excess: ``[3]``.

        The excess is the curvature on average over labels, in units of that at the drawn ones.
        Where the loss is no known likelihood, an example is an observation.
        """
        total = sample.new_zeros(len(SUMS), dtype=torch.float64)
        for start, own in self._parts.items():
            if start or is_first_rank():  # all ranks look at the first batch
                total += own
        of = dict(zip(SUMS, sum_over_ranks(total).tolist(), strict=True))
        if of["unknown"]:
            return torch.tensor([1.0, math.inf, 1.0], dtype=torch.float64)
        excess = of["expected"] / of["seen"] if of["seen"] else 1.0
        values = of["labels"] / of["examples"] if of["with_variance"] else math.inf
        scale = of["residuals"] if of["with_variance"] else of["squares"]
        count = of["labels"] / scale if scale else math.inf
        if self.of_data and of["with_variance"]:
            count *= count  # the labels have the variance of the errors, not the loss's own
        return torch.tensor([count, values, excess], dtype=torch.float64)
