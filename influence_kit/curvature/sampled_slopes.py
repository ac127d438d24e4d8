"""Gradients in the model's outputs whose outer products have the Fisher matrix as their mean.

The Fisher matrix is the mean of g g^T over labels sampled from the model. If the model is sure,
nearly all of it comes from labels that are hardly ever sampled, so that the gradients at sampled
labels may show a hundredth of it. A sampled slope (``Likelihood.sample``) is random signs times a
root of the covariance of those slopes: the mean of its outer product is the same, and its norm
hardly varies.

A slope depends only on the seed, the example's index and the model's outputs for the example.
The loss is compared with a negative log-likelihood; any other loss is refused.

Shapes: n examples, T positions (tokens) of an example, c classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from influence_kit.core.dtypes import exact
from influence_kit.curvature.likelihoods import (
    Likelihood,
    Normal,
    Sigmoid,
    Softmax,
    factors_of,
    rounding_of,
)
from influence_kit.curvature.observations import LabelStatistics
from influence_kit.curvature.passes import refuse_non_finite
from influence_kit.data.batches import SLOPES, Batch, call_model, with_item
from influence_kit.data.class_labels import label_key, labels_of, logits_of, with_logits
from influence_kit.errors import InvalidArgumentError
from influence_kit.losses.loss import Loss

BITS = 64
# float32 ``[256, 8]``
SIGNS_OF_BYTES = (((torch.arange(256)[:, None] >> torch.arange(8)) & 1) * 2 - 1).float()
# how the Fisher matrix is estimated, which a saved fit names
ESTIMATE = "at sampled slopes"


def settings_of(curvature: str) -> dict[str, str]:
    """The settings that a fit of a curvature depends on, beside its seed."""
    return {"fisher": ESTIMATE} if curvature == "fisher" else {}


def signs(seed: int, indices: Tensor, positions: int, each: int) -> Tensor:
    """Random signs for the examples of given indices, float32 ``[n, positions, each]``.

    They depend on seed, index and position only: the same for any batch size and number of
    positions, on any device.
    """
    words = -(-each // BITS)
    hashed = hashes(seed, indices, positions * words)
    octets = hashed.view(torch.uint8).int().view(len(indices), positions, 8 * words)
    found = F.embedding(octets, SIGNS_OF_BYTES.to(hashed.device))
    return found.flatten(2)[..., :each]


def hashes(seed: int, indices: Tensor, each: int) -> Tensor:
    """Hashes (splitmix64) of seed, index and position, int64 ``[n, each]``."""
    state = indices[:, None] * (1 << 32) + torch.arange(each, device=indices.device)
    state = state + torch.tensor(seed, device=indices.device) * _signed(0xD1B54A32D192ED03)
    state = (state + 1) * _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        state = (state ^ ((state >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    return state


def _signed(value: int) -> int:
    """An unsigned 64-bit number as the signed one with the same bits."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _products(outputs: Any, targets: Any) -> Tensor:
    """The inner product ``[n]`` of each example's logits and slopes, whose gradient they are."""
    slopes = targets[SLOPES] if isinstance(targets, Mapping) else targets
    products: Tensor = exact(logits_of(outputs)) * slopes
    return products.reshape(len(slopes), -1).sum(1)


# one object: gradients at a loss that has been checked are not checked again
OF_SLOPES = Loss(_products, "none", "loss_fn")


@dataclass
class SampledSlopes:
    """Puts sampled slopes into batches; ``OF_SLOPES`` is the loss of such batches.

    Args:
        model: the model.
        loss: the loss, with a known reduction.
        seed: the seed of the samples.
    """

    model: nn.Module
    loss: Loss
    seed: int
    likelihood: Likelihood | None = None

    def __call__(self, indices: Tensor, batch: Batch) -> Batch:
        """The batch of the examples of indices ``[n]``, with sampled slopes."""
        return self.sampled(indices, batch)[0]

    def sampled(self, indices: Tensor, batch: Batch) -> tuple[Batch, LabelStatistics]:
        """The same, and the statistics of the labels."""
        outputs, logits, labels, likelihood = self._known(indices, batch)
        factors = self._factors(likelihood, outputs, batch)
        slopes = likelihood.sample(exact(logits), labels, partial(signs, self.seed, indices))
        statistics = self._statistics(likelihood, factors, logits, labels)
        return _with_slopes(batch, slopes.mul_(factors)), statistics

    def given(self, indices: Tensor, batch: Batch) -> LabelStatistics | None:
        """The statistics of the labels; None if the loss is not a known likelihood."""
        try:
            outputs, logits, labels, likelihood = self._known(indices, batch)
        except InvalidArgumentError:
            return None
        factors = self._factors(likelihood, outputs, batch)
        return self._statistics(likelihood, factors, logits, labels)

    def _known(self, indices: Tensor, batch: Batch) -> tuple[Any, Tensor, Tensor, Likelihood]:
        """The model's outputs, the logits in them, the labels, the likelihood."""
        with torch.no_grad():
            outputs = call_model(self.model, batch)
            logits, labels = self._found(logits_of, outputs), self._found(labels_of, batch)
        # an infinite logit may mean that a class is impossible
        refuse_non_finite(logits.nan_to_num(nan=torch.nan, posinf=0.0, neginf=0.0))
        if self.likelihood is None:
            likelihood = self._likelihood(logits, labels)
            self._check(likelihood, outputs, batch)
            self.likelihood = likelihood
        return outputs, logits, labels, self.likelihood

    def _factors(self, likelihood: Likelihood, outputs: Any, batch: Batch) -> Tensor:
        """The loss's slope over that of the likelihood, one per label; 0 where there is none."""
        logits = logits_of(outputs)
        labels = likelihood.unlikely(logits, labels_of(batch))
        found = self._slopes(outputs, self._with_labels(batch, labels))
        return likelihood.factors(exact(found), exact(logits), labels)

    def _statistics(
        self, likelihood: Likelihood, factors: Tensor, logits: Tensor, labels: Tensor
    ) -> LabelStatistics:
        residuals = None
        if isinstance(likelihood, Normal):
            residuals = likelihood.precision * (logits - labels).double().square().sum()
        squares = factors.double().square().sum()
        return LabelStatistics((factors > 0).sum(), squares, residuals)

    def _slopes(self, outputs: Any, batch: Batch) -> Tensor:
        """The gradient of the loss in the logits."""
        logits = logits_of(outputs).detach().requires_grad_()
        with torch.enable_grad():
            total = self.loss.total(with_logits(outputs, logits), batch, len(labels_of(batch)))
        found = torch.zeros_like(logits)
        if total.requires_grad:
            found = torch.autograd.grad(total, logits, materialize_grads=True)[0]
        return found

    def _found(self, look: Callable[[Any], Tensor], where: Any) -> Tensor:
        """The result of ``look``; its error, with the consequence for the Fisher matrix."""
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

    def _check(self, likelihood: Likelihood, outputs: Any, batch: Batch) -> None:
        """Compare the slope of the loss at some labels with that of the likelihood."""
        logits = logits_of(outputs)
        factors: list[Tensor] = []
        for labels in likelihood.probes(logits, labels_of(batch)):
            try:
                found = self._slopes(outputs, self._with_labels(batch, labels))
            except Exception as error:  # any error of a loss that is made for other labels
                raise self._refusal(f"it fails at other labels: {error}") from error
            expected = likelihood.slope(logits, labels)
            factors.append(factors_of(found, expected, likelihood.axis))
            rest, close = (found - factors[-1] * expected).abs().max(), rounding_of(found)
            if not bool((factors[-1] >= 0).all()) or rest > close * found.abs().max():
                raise self._refusal("its slope differs")
            if not torch.allclose(
                factors[0], factors[-1], close, close * float(factors[0].abs().max())
            ):
                raise self._refusal("it weighs labels differently")
        if not likelihood.settles(factors[0]):
            raise self._refusal("it weighs outputs differently")

    def _refusal(self, why: str) -> InvalidArgumentError:
        return InvalidArgumentError(
            f"no labels can be sampled from the model for curvature='fisher': `{self.loss.name}` "
            "is not the negative log-likelihood of a softmax, sigmoid or normal distribution of "
            f"the outputs ({why}); use curvature='empirical_fisher' (labels of the data), or 'ggn' "
            "if the method has it"
        )


def _with_slopes(batch: Batch, slopes: Tensor) -> Batch:
    """The batch with slopes in place of the targets, or, in a dict, beside them."""
    return with_item(batch, SLOPES if isinstance(batch, Mapping) else len(batch) - 1, slopes)


def _class_axis(logits: Tensor, labels: Tensor, shift: int) -> int | None:
    """The dimension of the logits that counts classes; None if the shapes do not fit."""
    if logits.dim() != labels.dim() + 1:
        return None
    if logits.shape[:-1] == labels.shape:
        return -1
    without = (*logits.shape[:1], *logits.shape[2:])
    return 1 if without == tuple(labels.shape) and not shift else None
