"""Distributions of labels given a model's outputs, to sample from and to compare with a loss.

Supported are the softmax (integer labels), independent sigmoids (``BCEWithLogitsLoss``), and the
normal distribution with fixed variance (squared error).

Shapes: n examples, c classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

# the number of classes at which a loss is compared, for few and for many logits
MANY_PROBES, FEW_PROBES, MANY_LOGITS = 64, 8, 10**6


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

    # the dimension of the logits over which one label is sampled; None if each has its own
    axis: int | None = None

    @abstractmethod
    def draw(self, logits: Tensor, labels: Tensor, u: Tensor) -> Tensor:
        """Sampled labels of the shape and dtype of ``labels``, from uniform numbers."""

    @abstractmethod
    def probes(self, logits: Tensor, labels: Tensor) -> Iterable[Tensor]:
        """Labels like ``labels`` at which a loss is compared."""

    @abstractmethod
    def slope(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The gradient of -log likelihood in the logits, up to one factor per position."""

    @abstractmethod
    def mean_squares(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean square of ``slope`` over sampled labels, one per label."""

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

    def draw(self, logits: Tensor, labels: Tensor, u: Tensor) -> Tensor:
        """By the inverse cumulative distribution; negative labels stay (they are ignored)."""
        cumulative = self._log_probabilities(logits).double().exp().cumsum(-1)
        if self.shift:
            cumulative, u = cumulative[:, : -self.shift], u[:, self.shift :]
        levels = u.unsqueeze(-1) * cumulative[..., -1:]
        drawn = torch.searchsorted(cumulative.contiguous(), levels.contiguous()).squeeze(-1)
        drawn = drawn.clamp(max=logits.shape[self.axis] - 1).to(labels.dtype)
        if self.shift:
            drawn = torch.cat([labels[:, : self.shift], drawn], dim=1)
        return torch.where(labels < 0, labels, drawn)

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

    def mean_squares(self, logits: Tensor, labels: Tensor) -> Tensor:
        # the sum of p (1 - p); if a probability rounds to 1, 1 - p is the sum of the others
        others = self._log_probabilities(logits).exp()
        others = others.scatter(-1, others.argmax(-1, keepdim=True), 0.0)
        rest = others.sum(-1)
        squares = (1 - rest) * rest + (others * (1 - others)).sum(-1)
        return squares * (self._targets(labels) >= 0)


class Sigmoid(Likelihood):
    """Independent labels 0 and 1."""

    def draw(self, logits: Tensor, labels: Tensor, u: Tensor) -> Tensor:
        return (u < logits.double().sigmoid()).to(labels.dtype)

    def probes(self, logits: Tensor, labels: Tensor) -> Iterable[Tensor]:
        return torch.zeros_like(labels), torch.ones_like(labels)

    def slope(self, logits: Tensor, labels: Tensor) -> Tensor:
        return logits.sigmoid() - labels

    def mean_squares(self, logits: Tensor, labels: Tensor) -> Tensor:
        return logits.sigmoid() * (-logits).sigmoid()


@dataclass
class Normal(Likelihood):
    """A normal distribution around the outputs; the loss is -log of it at its precision."""

    precision: float = 1.0

    def draw(self, logits: Tensor, labels: Tensor, u: Tensor) -> Tensor:
        noise: Tensor = torch.special.ndtri(u).to(logits) / self.precision**0.5
        return (logits + noise).to(labels.dtype)

    def probes(self, logits: Tensor, labels: Tensor) -> Iterable[Tensor]:
        return ((logits + step).to(labels.dtype) for step in (1.0, -1.0, 2.0))

    def slope(self, logits: Tensor, labels: Tensor) -> Tensor:
        return logits - labels

    def mean_squares(self, logits: Tensor, labels: Tensor) -> Tensor:
        return torch.full_like(logits, 1 / self.precision)

    def settles(self, factors: Tensor) -> bool:
        self.precision = float(factors.median())
        return self.precision > 0 and torch.allclose(
            factors, factors.median(), rounding_of(factors)
        )
