"""Labels drawn from the model, for the Fisher matrix: a label depends on its example's place alone.

Known likelihoods: softmax (integer labels), independent sigmoids (``BCEWithLogitsLoss``), and the
normal distribution with fixed variance (squared error). A loss is compared with what it is taken
for; any other is refused.

Letters: n examples, c classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from influence_kit.data import Batch, call_model, with_item
from influence_kit.errors import InvalidArgumentError
from influence_kit.labels import label_key, labels_of, logits_of, with_logits
from influence_kit.losses import Loss
from influence_kit.operators.passes import refuse_non_finite

# classes that a loss is compared at: of few logits and of many
MANY_PROBES, FEW_PROBES, MANY_LOGITS = 64, 8, 10**6


def uniform(seed: int, places: Tensor, each: int) -> Tensor:
    """Numbers in (0, 1) for the examples at some places, float64 ``[n, each]``.

    A hash (splitmix64) of seed, place and position: the same for any batch size, on any device.
    """
    state = places[:, None] * (1 << 32) + torch.arange(each, device=places.device)
    state = state + torch.tensor(seed, device=places.device) * _signed(0xD1B54A32D192ED03)
    state = (state + 1) * _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        state = (state ^ ((state >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    return (((state >> 11) & ((1 << 53) - 1)).double() + 0.5) * 2.0**-53


def _signed(value: int) -> int:
    """An unsigned 64-bit number as the signed one of the same bits."""
    return value - (1 << 64) if value >= 1 << 63 else value


@dataclass
class ModelLabels:
    """Puts labels that are drawn from the model in the place of the data's.

    Args:
        model: the model.
        loss: the loss at the data's labels, settled.
        seed: of the draws.
    """

    model: nn.Module
    loss: Loss
    seed: int
    likelihood: Likelihood | None = None

    def __call__(self, places: Tensor, batch: Batch) -> Batch:
        """The batch of the examples at some places ``[n]``, with other labels."""
        with torch.no_grad():
            outputs = call_model(self.model, batch)
            logits, labels = self._found(logits_of, outputs), self._found(labels_of, batch)
        # an infinite logit may say that a class is impossible
        refuse_non_finite(logits.nan_to_num(nan=torch.nan, posinf=0.0, neginf=0.0))
        if self.likelihood is None:
            likelihood = self._likelihood(logits, labels)
            self._check(likelihood, outputs, batch, len(places))
            self.likelihood = likelihood
        u = self._uniform(labels, places, self.seed)
        return self._with_labels(batch, self.likelihood.draw(logits, labels, u))

    def _uniform(self, labels: Tensor, places: Tensor, seed: int) -> Tensor:
        return uniform(seed, places, labels.numel() // len(places)).view(labels.shape)

    def _found(self, look: Callable[[Any], Tensor], where: Any) -> Tensor:
        """What ``look`` finds; its error with what it means for the Fisher matrix."""
        try:
            return look(where)
        except InvalidArgumentError as error:
            raise self._refusal(str(error)) from None

    def _with_labels(self, batch: Batch, labels: Tensor) -> Batch:
        return with_item(batch, label_key(batch), labels)

    def _likelihood(self, logits: Tensor, labels: Tensor) -> Likelihood:
        if logits.is_complex():
            raise self._refusal("the outputs are complex")
        if not labels.is_floating_point():
            axis = _class_axis(logits, labels, self.loss.shift)
            if axis is None:
                raise self._refusal(
                    f"logits of shape {list(logits.shape)} do not fit integer labels of shape "
                    f"{list(labels.shape)}"
                )
            return Softmax(axis, self.loss.shift)
        if logits.shape != labels.shape:
            raise self._refusal(
                f"outputs of shape {list(logits.shape)} do not fit targets of shape "
                f"{list(labels.shape)}"
            )
        return Sigmoid() if self.loss.is_binary else Normal()

    def _check(self, likelihood: Likelihood, outputs: Any, batch: Batch, n: int) -> None:
        """Compare the loss's slope at some labels with that of the likelihood it is taken for."""
        known = logits_of(outputs)
        logits = known.detach().requires_grad_()
        shown = with_logits(outputs, logits)
        factors: list[Tensor] = []
        for labels in likelihood.probes(known, labels_of(batch)):
            with torch.enable_grad():
                total = self.loss.total(shown, self._with_labels(batch, labels), n)
            found = torch.zeros_like(logits)
            if total.requires_grad:
                found = torch.autograd.grad(total, logits, materialize_grads=True)[0]
            expected = likelihood.slope(known, labels)
            factors.append(_factors(found, expected, likelihood.axis))
            rest, close = (found - factors[-1] * expected).abs().max(), _close(found)
            if not bool((factors[-1] >= 0).all()) or rest > close * found.abs().max():
                raise self._refusal("its slope is another")
            if not torch.allclose(
                factors[0], factors[-1], close, close * float(factors[0].abs().max())
            ):
                raise self._refusal("it weighs labels differently")
        if not likelihood.settles(factors[0]):
            raise self._refusal("it weighs outputs differently")

    def _refusal(self, why: str) -> InvalidArgumentError:
        return InvalidArgumentError(
            f"no labels can be drawn from the model for curvature='fisher': `{self.loss.name}` is "
            "not the negative log-likelihood of a softmax, sigmoid or normal distribution of the "
            f"outputs ({why}); use curvature='empirical_fisher' (labels of the data), or 'ggn' "
            "where the method has it"
        )


def _factors(found: Tensor, expected: Tensor, axis: int | None) -> Tensor:
    """By what the expected slopes are multiplied, a number for each label."""
    if axis is None:
        return torch.where(expected == 0, 0.0, found / expected)
    # the slopes of labels that are all but certain are so small that their squares would be 0
    largest = expected.abs().amax(axis, keepdim=True)
    found, expected = (torch.where(largest > 0, x / largest, 0.0) for x in (found, expected))
    square = expected.square().sum(axis, keepdim=True)
    return (found * expected).sum(axis, keepdim=True) / square.clamp(min=1)


def _close(slopes: Tensor) -> float:
    """The relative difference of slopes that rounding explains."""
    return max(1e-3, 10 * torch.finfo(slopes.dtype).eps)


def _class_axis(logits: Tensor, labels: Tensor, shift: int) -> int | None:
    """The dimension of the logits that counts classes; None where the shapes do not fit."""
    if logits.dim() != labels.dim() + 1:
        return None
    if logits.shape[:-1] == labels.shape:
        return -1
    without = (*logits.shape[:1], *logits.shape[2:])
    return 1 if without == tuple(labels.shape) and not shift else None


class Likelihood(ABC):
    """A distribution of the labels, given the logits."""

    # the dimension of the logits over which one label is drawn; None where each has its own
    axis: int | None = None

    @abstractmethod
    def draw(self, logits: Tensor, labels: Tensor, u: Tensor) -> Tensor:
        """Labels like ``labels``, from uniform numbers of their shape."""

    @abstractmethod
    def probes(self, logits: Tensor, labels: Tensor) -> Iterable[Tensor]:
        """Labels like ``labels`` that show what a loss makes of each possible one."""

    @abstractmethod
    def slope(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The gradient of -log likelihood in the logits, up to a factor a position."""

    def settles(self, factors: Tensor) -> bool:
        """Take note of the loss's slope divided by ``slope``; whether it can be taken."""
        return True


class Softmax(Likelihood):
    """Softmax over a dimension; with ``shift`` the logits at t are those of label t + 1."""

    def __init__(self, axis: int, shift: int) -> None:
        self.axis: int = axis
        self.shift = shift

    def _log_probabilities(self, logits: Tensor) -> Tensor:
        return logits.movedim(self.axis, -1).log_softmax(-1)

    def draw(self, logits: Tensor, labels: Tensor, u: Tensor) -> Tensor:
        """By the inverse of the cumulative distribution; labels below 0 stay (they are ignored)."""
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
        targets = labels.long()
        if self.shift:
            targets = torch.full_like(targets, -1)
            targets[:, : -self.shift] = labels[:, self.shift :]
        chosen = torch.zeros_like(probabilities)
        chosen.scatter_(-1, targets.clamp(min=0).unsqueeze(-1), 1.0)
        slope = (probabilities - chosen) * (targets >= 0).unsqueeze(-1)
        return slope.movedim(-1, self.axis)


class Sigmoid(Likelihood):
    """Independent labels 0 and 1."""

    def draw(self, logits: Tensor, labels: Tensor, u: Tensor) -> Tensor:
        return (u < logits.double().sigmoid()).to(labels.dtype)

    def probes(self, logits: Tensor, labels: Tensor) -> Iterable[Tensor]:
        return torch.zeros_like(labels), torch.ones_like(labels)

    def slope(self, logits: Tensor, labels: Tensor) -> Tensor:
        return logits.sigmoid() - labels


@dataclass
class Normal(Likelihood):
    """A normal distribution about the outputs, of the precision at which the loss is -log of it."""

    precision: float = 1.0

    def draw(self, logits: Tensor, labels: Tensor, u: Tensor) -> Tensor:
        noise: Tensor = torch.special.ndtri(u).to(logits) / self.precision**0.5
        return (logits + noise).to(labels.dtype)

    def probes(self, logits: Tensor, labels: Tensor) -> Iterable[Tensor]:
        return ((logits + step).to(labels.dtype) for step in (1.0, -1.0, 2.0))

    def slope(self, logits: Tensor, labels: Tensor) -> Tensor:
        return logits - labels

    def settles(self, factors: Tensor) -> bool:
        self.precision = float(factors.median())
        return self.precision > 0 and torch.allclose(factors, factors.median(), _close(factors))
