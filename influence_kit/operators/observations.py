"""As how many observations a training set counts, in the units of a loss.

The negative log-likelihood of a training set is a sum over its labels, the curvature C of an
influence function the mean over examples of a loss in any units: the mean over the tokens of each,
or a squared error. N times C is the curvature of the negative log-likelihood.

Shapes: n examples of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from influence_kit.distributed import sum_over_ranks
from influence_kit.gradients.per_example import Gradients


@dataclass(frozen=True)
class LabelFacts:
    """What the labels of a batch say.

    Args:
        examples: the number n.
        labels: how many labels count.
        squares: the sum over labels of the squared factor between the loss and the negative
            log-likelihood (1 / T for a mean over T tokens).
        residuals: the sum over labels of the squared error, in units of the variance at which the
            loss is a negative log-likelihood; None where the likelihood has no variance.
        weights: of each example ``[n]``: the squared slope that its labels have on average, over
            that of the labels it has.
    """

    examples: int
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
    def of(facts: Tensor, n: int) -> Observations:
        """Of ``n`` training examples, given what ``Tally.result`` found."""
        count, values = facts.tolist()
        return Observations(n * count, n * values)


# where the loss is no known likelihood: each example is one observation
ONE_EACH = torch.tensor([1.0, math.inf], dtype=torch.float64)


class Tally:
    """Sums over the batches of a pass; a batch that comes twice counts once."""

    def __init__(self) -> None:
        self._parts: dict[int, Tensor] = {}
        self._has_variance = False

    def add(self, place: int, facts: LabelFacts, gradients: Gradients) -> None:
        """Take the batch whose first example stands at ``place``.

        A label that the model thinks unlikely is drawn rarely, and its gradient is large: of a
        confident model a few draws have nearly all of the curvature, or none came. Each example's
        squared gradient times its weight is what it would be on average over labels.
        """
        squares = gradients.squared_norms().double()
        self._has_variance = facts.residuals is not None
        sums = (facts.examples, facts.labels, facts.squares, facts.residuals or 0.0)
        own = [torch.as_tensor(value, dtype=torch.float64, device=squares.device) for value in sums]
        self._parts[place] = torch.stack([*own, squares.sum(), squares @ facts.weights])

    def result(self, places: Iterable[int], sample: Tensor) -> Tensor:
        """N and the number of values with a variance, both for each example: ``[2]``, float64.

        Args:
            places: of the first examples of the batches that this rank counts.
            sample: a tensor on the device.
        """
        total = sample.new_zeros(6, dtype=torch.float64)
        for place in places:
            total += self._parts[place]
        examples, labels, squares, residuals, seen, expected = sum_over_ranks(total)
        # of the gradients at the drawn labels, in units of those expected
        excess = expected / seen if seen > 0 else torch.ones_like(seen)
        if self._has_variance:
            found = torch.stack([excess * labels / residuals, labels / examples])
        else:
            found = torch.stack([excess * labels / squares, torch.full_like(labels, math.inf)])
        return found.cpu()
