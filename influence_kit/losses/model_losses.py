"""Losses per example that a model's own loss may be made of, from logits and labels.

Shapes: n examples.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from influence_kit.core.dtypes import HALF
from influence_kit.data.class_labels import IGNORED_LABEL, logits_of
from influence_kit.errors import InvalidArgumentError

# the tolerance of slopes, relative to the largest: in half precision, and else
SLOPES_CLOSE_HALF, SLOPES_CLOSE = 1e-2, 1e-5
# gradients of parameters add up the differences of slopes
GRADIENTS_CLOSE = 10

# each example's losses summed, and their number, both ``[n]``; None if the shapes do not fit
OwnFormula = Callable[[Tensor, Tensor], tuple[Tensor, Tensor] | None]


@dataclass(frozen=True)
class Reading:
    """What a loss of a batch may be, given each example's sum and count of losses, both ``[n]``.

    Attributes:
        name: for errors.
        examples: the losses of the examples, ``[n]``; 0 for an example without labels.
        whole: the loss of the batch.
    """

    name: str
    examples: Callable[[Tensor, Tensor], Tensor]
    whole: Callable[[Tensor, Tensor], Tensor]


def _means(sums: Tensor, counts: Tensor) -> Tensor:
    return sums / counts.clamp(min=1)


# the likeliest first
READINGS = (
    Reading("the mean over its labelled positions", _means, lambda s, c: s.sum() / c.sum()),
    Reading("the mean of its examples' means", _means, lambda s, c: _means(s, c).mean()),
    Reading("the mean of its labelled examples' means", _means, lambda s, c: (s / c)[c > 0].mean()),
    Reading("the mean of its examples' sums", lambda s, c: s, lambda s, c: s.mean()),
)


@dataclass(frozen=True)
class OwnLoss:
    """A loss per example that gives a model's own loss: called with the outputs and the batch."""

    formula: OwnFormula
    reading: Reading

    def __call__(self, outputs: Any, batch: Any) -> Tensor:
        """The loss of each example, ``[n]``."""
        return self.reading.examples(*self._found(logits_of(outputs), batch["labels"]))

    def whole(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of the batch."""
        return self.reading.whole(*self._found(logits, labels))

    def has_slopes(self, outputs: Any, labels: Tensor, own: Tensor) -> bool:
        """Whether the model's own loss has this loss's gradients, if any.

        At the logits: if a model's head is zero, all formulas have the same values, and only
        gradients differ. At the parameters: an added loss of hidden layers has no slopes there,
        and its value may be small, or zero.
        """
        logits = logits_of(outputs)
        if not (logits.requires_grad and own.requires_grad):
            return True
        close = SLOPES_CLOSE_HALF if {logits.dtype, own.dtype} & set(HALF) else SLOPES_CLOSE
        with torch.enable_grad():
            (expected,) = torch.autograd.grad(own, logits, retain_graph=True, allow_unused=True)
            if expected is not None:  # else the loss was computed from a copy
                leaf = logits.detach().requires_grad_()
                (slopes,) = torch.autograd.grad(self.whole(leaf, labels), leaf)
                if not _are_close(slopes, expected, close):
                    return False
            rest = own - self.whole(logits, labels)
            leaves = _leaves(rest)
            whole, others = (
                torch.autograd.grad(one, leaves, retain_graph=True, materialize_grads=True)
                for one in (own, rest)
            )
        size = max(gradient.abs().max() for gradient in whole)
        limit = GRADIENTS_CLOSE * close * size
        return all(bool(gradient.abs().max() <= limit) for gradient in others)

    def _found(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        found = self.formula(logits, labels)
        if found is None:
            raise InvalidArgumentError(
                f"logits of shape {list(logits.shape)} and labels of shape {list(labels.shape)} "
                "do not fit the formula that the model's own loss followed in earlier batches: "
                "pass a `loss_fn` with one value per example"
            )
        return found


def token_losses(logits: Tensor, labels: Tensor, shift: int = 0) -> tuple[Tensor, Tensor] | None:
    """Each sequence's cross-entropy summed over its labelled tokens, and their number, ``[n]``."""
    if logits.dim() != 3 or labels.dim() != 2 or len(labels) != len(logits):
        return None
    if logits.shape[1] < labels.shape[1]:
        return None
    losses, counted = labelled_losses(logits, labels, shift)
    return losses.sum(1), counted.sum(1)


def labelled_losses(logits: Tensor, labels: Tensor, shift: int) -> tuple[Tensor, Tensor]:
    """The cross-entropy of each label, 0 where it is ignored, and where it is not.

    Both ``[n, t - shift]`` for logits ``[n, t, c]``, whose position s predicts label s + shift.
    """
    logits = _exact(logits)
    # positions that the model prepends (a soft prompt) have no labels
    labels = F.pad(labels, (logits.shape[1] - labels.shape[1], 0), value=IGNORED_LABEL)
    logits, labels = logits[:, : logits.shape[1] - shift], labels[:, shift:]
    losses = F.cross_entropy(
        logits.transpose(1, 2), labels, ignore_index=IGNORED_LABEL, reduction="none"
    )
    return losses, labels != IGNORED_LABEL


def next_token_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor] | None:
    """``token_losses`` if position t predicts label t + 1."""
    return token_losses(logits, labels, shift=1)


def class_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor] | None:
    """The cross-entropy of one class per example, and 1, both ``[n]``."""
    if logits.dim() != 2 or labels.dim() != 1 or labels.is_floating_point():
        return None
    losses = F.cross_entropy(_exact(logits), labels, reduction="none")
    return losses, torch.ones_like(labels)


def _exact(logits: Tensor) -> Tensor:
    """Half precision as float32, in which models in half precision compute their losses, too."""
    half = logits.dtype in (torch.float16, torch.bfloat16)
    return logits.float() if half else logits


def own_losses(
    outputs: Any, batch: Any, own: Tensor, singles: Tensor, close: float
) -> list[OwnLoss]:
    """The losses per example that give a model's own loss, the likeliest first.

    Several, if they are the same in this batch: a sum over tokens is the mean where all examples
    have one.

    Args:
        outputs: the model's outputs for a batch.
        batch: the batch.
        own: its loss, with its graph.
        singles: the losses of its examples alone, ``[n]``.
        close: relative difference that rounding explains.
    """
    labels = batch["labels"]
    # single examples and the batch, as class weights only show in the batch
    values = torch.cat([singles, own.detach().reshape(1)])
    for formula in OWN_FORMULAS:
        if formula(logits_of(outputs), labels) is None:
            continue
        found = []
        for one in (OwnLoss(formula, reading) for reading in READINGS):
            expected = torch.cat(
                [one(outputs, batch), one.whole(logits_of(outputs), labels).reshape(1)]
            )
            is_same = torch.allclose(expected, values.to(expected), close, 1e-12)
            if is_same and one.has_slopes(outputs, labels, own):
                found.append(one)
        if found:
            return found
    return []


def still_own(losses: list[OwnLoss], outputs: Any, labels: Tensor, where: str) -> list[OwnLoss]:
    """Which of the losses that gave a model's own loss so far do in this batch, the nearest first.

    Raises:
        InvalidArgumentError: if none does.
    """
    own = outputs.get("loss") if isinstance(outputs, Mapping) else None
    own = getattr(outputs, "loss", None) if own is None else own
    if not isinstance(own, Tensor) or not torch.isfinite(own):
        return losses
    expected = torch.stack([one.whole(logits_of(outputs), labels) for one in losses]).to(own)
    close = 3e-2 if _is_half(own) else 1e-4
    fits = torch.isclose(expected, own, close, 1e-6)
    if not bool(fits.any()):
        raise InvalidArgumentError(
            f"{where}: the model's own loss is {own.item():.6g}, but {losses[0].reading.name}, "
            f"which it equalled in earlier batches, is {expected[0].item():.6g}: the loss "
            "per example is not known. Pass a `loss_fn` with one value per example"
        )
    nearest = (expected - own).abs().argsort(stable=True).tolist()
    return [losses[i] for i in nearest if fits[i]]


def _are_close(found: Tensor, expected: Tensor, close: float) -> bool:
    """Whether slopes are the same, relative to the largest and to the rounding of 1."""
    limit = close * expected.abs().max() + 8 * torch.finfo(expected.dtype).eps
    return bool(((found - expected).abs() <= limit).all())


def _leaves(total: Tensor) -> list[Tensor]:
    """The leaves of a sum's graph that require gradients, with entries."""
    found: dict[int, Tensor] = {}
    waiting: list[Any] = [total.grad_fn]
    seen = set(waiting)
    while waiting:
        for node, _ in waiting.pop().next_functions:
            variable = getattr(node, "variable", None)
            if variable is not None and variable.numel():
                found[id(variable)] = variable
            elif node is not None and node not in seen:
                seen.add(node)
                waiting.append(node)
    return list(found.values())


def _is_half(value: Tensor) -> bool:
    """Whether a number, of any dtype, is exact in half precision."""
    return any(bool(value == value.to(half).to(value)) for half in HALF)


# the likeliest first
OWN_FORMULAS: tuple[OwnFormula, ...] = (next_token_losses, token_losses, class_losses)
