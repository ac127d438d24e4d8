"""Distributions of labels given a model's outputs: their Fisher matrix, and the losses they fit.

Supported are the softmax (integer labels), independent sigmoids (``BCEWithLogitsLoss``), and the
normal distribution with fixed variance (squared error).

Shapes: n examples, T positions of an example, c classes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

# the number of classes at which a loss is compared, for few and for many logits
MANY_PROBES, FEW_PROBES, MANY_LOGITS = 64, 8, 10**6
# a class whose root of a probability is at least this share of the largest is a likeliest one
TIE = 0.99
# makes random signs for each example: ``signs(T, c)`` is a new tensor ``[n, T, c]``
Signs = Callable[[int, int], Tensor]


def factors_of(found: Tensor, expected: Tensor, axis: int | None) -> Tensor:
    """The factor between the found and the expected slopes, one per label."""
    if axis is None:
        return torch.where(expected == 0, 0.0, found / expected)
    # slopes of nearly certain labels are so small that their squares would be 0
    largest = expected.abs().amax(axis, keepdim=True)
    found, expected = (torch.where(largest > 0, x / largest, 0.0) for x in (found, expected))
    square = expected.square().sum(axis, keepdim=True)
    return (found * expected).sum(axis, keepdim=True) / square.clamp(min=1)


def rounding_of(slopes: Tensor) -> float:
    """The relative difference of slopes that rounding can explain."""
    return max(1e-3, 10 * torch.finfo(slopes.dtype).eps)


class Likelihood(ABC):
    """A distribution of the labels, given the logits."""

    # the dimension of the logits that one label belongs to; None if each logit has its own
    axis: int | None = None

    @abstractmethod
    def sample(self, logits: Tensor, labels: Tensor, signs: Signs) -> Tensor:
        """Vectors like the logits: random signs times a root of the covariance of ``slope``.

        The covariance is that over labels distributed as the model predicts; 0 for positions
        without a label.
        """

    @abstractmethod
    def unlikely(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Labels like ``labels`` at which ``slope`` is far from 0."""

    def factors(self, found: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """The factor between the slopes of a loss that fits and ``slope``, one per label."""
        return factors_of(found, self.slope(logits, labels), self.axis)

    @abstractmethod
    def probes(self, logits: Tensor, labels: Tensor) -> Iterable[Tensor]:
        """Labels like ``labels`` at which a loss is compared."""

    @abstractmethod
    def slope(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The gradient of -log likelihood in the logits, up to one factor per position."""

    def settles(self, factors: Tensor) -> bool:
        """Record the loss's slope divided by ``slope``; whether the loss fits the likelihood."""
        return True


class Softmax(Likelihood):
    """Softmax over a dimension; with ``shift`` the logits at t are those of label t + 1."""

    def __init__(self, axis: int, shift: int) -> None:
        self.axis: int = axis
        self.shift = shift

    def _log_probabilities(self, logits: Tensor) -> Tensor:
        return logits.movedim(self.axis, -1).log_softmax(-1)

    def _targets(self, labels: Tensor) -> Tensor:
        """The label that the logits of each position predict; negative if there is none."""
        targets = labels.long()
        if self.shift:
            targets = torch.full_like(targets, -1)
            targets[:, : -self.shift] = labels[:, self.shift :]
        return targets

    def sample(self, logits: Tensor, labels: Tensor, signs: Signs) -> Tensor:
        """The covariance of p - onehot(y) is diag(p) - p p^T = diag(u) (I - u u^T) diag(u).

        u is the root of p. A Householder reflection turns the unit vector of the likeliest class
        into -u, and those of the other classes, which get the signs, into a basis of what is
        orthogonal to u.
        """
        # in place: for a language model these are the largest tensors
        u = self._log_probabilities(logits).mul_(0.5).exp_()
        u.mul_((self._targets(labels) >= 0).unsqueeze(-1))
        classes = u.shape[-1]
        # the first of those that are as likely: rounding does not decide which
        likeliest = (u >= TIE * u.amax(-1, keepdim=True)).byte().argmax(-1, keepdim=True)
        largest = u.gather(-1, likeliest)
        slopes = signs(u[0].numel() // classes, classes).to(u).view_as(u)
        slopes.scatter_(-1, likeliest, 0.0)
        along = (u * slopes).sum(-1, keepdim=True)
        slopes.addcmul_(u, along / (1 + largest), value=-1).mul_(u)
        slopes.scatter_(-1, likeliest, -largest * along)
        return slopes.movedim(-1, self.axis)

    def unlikely(self, logits: Tensor, labels: Tensor) -> Tensor:
        # the least likely of the possible classes
        possible = torch.where(torch.isneginf(logits), torch.inf, logits).movedim(self.axis, -1)
        least = possible.argmin(-1).to(labels.dtype)
        if self.shift:
            least = torch.cat([labels[:, : self.shift], least[:, : -self.shift]], dim=1)
        return torch.where(labels < 0, labels, least)

    def factors(self, found: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        # at the label's own class: all classes would take several times the memory of the logits
        targets = self._targets(labels).unsqueeze(-1)
        own = targets.clamp(min=0)
        slope = self._log_probabilities(logits).gather(-1, own).expm1()
        ratio = found.movedim(self.axis, -1).gather(-1, own) / slope
        ratio = torch.where((targets >= 0) & (slope != 0), ratio, 0.0)
        return ratio.movedim(-1, self.axis)

    def probes(self, logits: Tensor, labels: Tensor) -> Iterable[Tensor]:
        classes = logits.shape[self.axis]
        count = MANY_PROBES if logits.numel() <= MANY_LOGITS else FEW_PROBES
        for label in torch.linspace(0, classes - 1, min(count, classes)).round().long().tolist():
            yield torch.where(labels < 0, labels, torch.full_like(labels, label))

    def slope(self, logits: Tensor, labels: Tensor) -> Tensor:
        probabilities = self._log_probabilities(logits).exp()
        targets = self._targets(labels)
        chosen = torch.zeros_like(probabilities)
        chosen.scatter_(-1, targets.clamp(min=0).unsqueeze(-1), 1.0)
        slope = (probabilities - chosen) * (targets >= 0).unsqueeze(-1)
        return slope.movedim(-1, self.axis)


class Sigmoid(Likelihood):
    """Independent labels 0 and 1."""

    def sample(self, logits: Tensor, labels: Tensor, signs: Signs) -> Tensor:
        deviation: Tensor = (logits.sigmoid() * (-logits).sigmoid()).sqrt()
        return deviation * signs(1, logits[0].numel()).to(logits).view_as(logits)

    def unlikely(self, logits: Tensor, labels: Tensor) -> Tensor:
        return (logits < 0).to(labels.dtype)

    def probes(self, logits: Tensor, labels: Tensor) -> Iterable[Tensor]:
        return torch.zeros_like(labels), torch.ones_like(labels)

    def slope(self, logits: Tensor, labels: Tensor) -> Tensor:
        return logits.sigmoid() - labels


@dataclass
class Normal(Likelihood):
    """A normal distribution around the outputs; the loss is -log of it at its precision."""

    precision: float = 1.0

    def sample(self, logits: Tensor, labels: Tensor, signs: Signs) -> Tensor:
        random = signs(1, logits[0].numel()).to(logits).view_as(logits)
        return random / math.sqrt(self.precision)

    def unlikely(self, logits: Tensor, labels: Tensor) -> Tensor:
        # in half precision a large output plus 1 would be the same
        far: Tensor = logits + logits.abs() + 1
        return far.to(labels.dtype)

    def probes(self, logits: Tensor, labels: Tensor) -> Iterable[Tensor]:
        return ((logits + step).to(labels.dtype) for step in (1.0, -1.0, 2.0))

    def slope(self, logits: Tensor, labels: Tensor) -> Tensor:
        return logits - labels

    def settles(self, factors: Tensor) -> bool:
        self.precision = float(factors.median())
        return self.precision > 0 and torch.allclose(
            factors, factors.median(), rounding_of(factors)
        )
