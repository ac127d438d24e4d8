"""Labels sampled from the model, for the Fisher matrix.

A label depends only on the seed, the example's index and the model's outputs for the example.
The loss is compared with a negative log-likelihood; any other loss is refused.

Shapes: n examples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

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
from influence_kit.data.batches import Batch, call_model, with_item
from influence_kit.data.class_labels import label_key, labels_of, logits_of, with_logits
from influence_kit.errors import InvalidArgumentError
from influence_kit.losses.loss import Loss


def uniform(seed: int, indices: Tensor, each: int) -> Tensor:
    """Uniform numbers in (0, 1) for the examples of given indices, float64 ``[n, each]``.

    A hash (splitmix64) of seed, index and position: the same for any batch size, on any device.
    """
    state = indices[:, None] * (1 << 32) + torch.arange(each, device=indices.device)
    state = state + torch.tensor(seed, device=indices.device) * _signed(0xD1B54A32D192ED03)
    state = (state + 1) * _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        state = (state ^ ((state >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    return (((state >> 11) & ((1 << 53) - 1)).double() + 0.5) * 2.0**-53


def _signed(value: int) -> int:
    """An unsigned 64-bit number as the signed one with the same bits."""
    return value - (1 << 64) if value >= 1 << 63 else value


@dataclass
class ModelLabels:
    """Replaces the labels of the data by labels sampled from the model.

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
        """The batch of the examples of indices ``[n]``, with sampled labels."""
        _, logits, labels, likelihood = self._known(indices, batch)
        u = self._uniform(labels, indices, self.seed)
        return self._with_labels(batch, likelihood.draw(logits, labels, u))

    def drawn(self, indices: Tensor, batch: Batch) -> tuple[Batch, LabelStatistics]:
        """The same, and the statistics of the sampled labels."""
        outputs, logits, labels, likelihood = self._known(indices, batch)
        u = self._uniform(labels, indices, self.seed)
        drawn = self._with_labels(batch, likelihood.draw(logits, labels, u))
        return drawn, self._statistics(likelihood, outputs, drawn, labels)

    def given(self, indices: Tensor, batch: Batch) -> LabelStatistics | None:
        """The statistics of the data's labels; None if the loss is not a known likelihood."""
        try:
            outputs, _, labels, likelihood = self._known(indices, batch)
        except InvalidArgumentError:
            return None
        statistics = self._statistics(likelihood, outputs, batch, labels)
        # gradients at the labels of the data are not rescaled
        return replace(statistics, weights=torch.ones_like(statistics.weights))

    def _known(self, indices: Tensor, batch: Batch) -> tuple[Any, Tensor, Tensor, Likelihood]:
        """The model's outputs, the logits in them, the labels of the data, the likelihood."""
        with torch.no_grad():
            outputs = call_model(self.model, batch)
            logits, labels = self._found(logits_of, outputs), self._found(labels_of, batch)
        # an infinite logit may mean that a class is impossible
        refuse_non_finite(logits.nan_to_num(nan=torch.nan, posinf=0.0, neginf=0.0))
        if self.likelihood is None:
            likelihood = self._likelihood(logits, labels)
            self._check(likelihood, outputs, batch, len(indices))
            self.likelihood = likelihood
        return outputs, logits, labels, self.likelihood

    def _statistics(
        self, likelihood: Likelihood, outputs: Any, batch: Batch, of_data: Tensor
    ) -> LabelStatistics:
        """The statistics of the labels in the batch; ``of_data`` are those of the data."""
        logits, labels = logits_of(outputs), labels_of(batch)
        n = len(labels)
        found = self._slopes(outputs, batch, n)
        factors = factors_of(found, likelihood.slope(logits, labels), likelihood.axis)
        factors = factors if likelihood.axis is None else factors.squeeze(likelihood.axis)
        squares = factors.double().square()
        expected = (squares * likelihood.mean_squares(logits, labels)).reshape(n, -1).sum(1)
        seen = torch.linalg.vector_norm(found.reshape(n, -1), dim=1).double().square()
        residuals = None
        if isinstance(likelihood, Normal):
            residuals = likelihood.precision * (logits - of_data).double().square().sum()
        return LabelStatistics(
            labels=(factors > 0).sum(),
            squares=squares.sum(),
            residuals=residuals,
            # an example without a slope has no gradient that could be rescaled
            weights=torch.where(seen > 0, expected / seen, torch.zeros_like(seen)),
        )

    def _slopes(self, outputs: Any, batch: Batch, n: int) -> Tensor:
        """The gradient of the loss in the logits."""
        logits = logits_of(outputs).detach().requires_grad_()
        with torch.enable_grad():
            total = self.loss.total(with_logits(outputs, logits), batch, n)
        found = torch.zeros_like(logits)
        if total.requires_grad:
            found = torch.autograd.grad(total, logits, materialize_grads=True)[0]
        return found

    def _uniform(self, labels: Tensor, indices: Tensor, seed: int) -> Tensor:
        return uniform(seed, indices, labels.numel() // len(indices)).view(labels.shape)

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

    def _check(self, likelihood: Likelihood, outputs: Any, batch: Batch, n: int) -> None:
        """Compare the slope of the loss at some labels with that of the likelihood."""
        logits = logits_of(outputs)
        factors: list[Tensor] = []
        for labels in likelihood.probes(logits, labels_of(batch)):
            try:
                found = self._slopes(outputs, self._with_labels(batch, labels), n)
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


def _class_axis(logits: Tensor, labels: Tensor, shift: int) -> int | None:
    """The dimension of the logits that counts classes; None if the shapes do not fit."""
    if logits.dim() != labels.dim() + 1:
        return None
    if logits.shape[:-1] == labels.shape:
        return -1
    without = (*logits.shape[:1], *logits.shape[2:])
    return 1 if without == tuple(labels.shape) and not shift else None
