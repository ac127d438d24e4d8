"""Formulas that a model's own loss may follow: a loss per example, from logits and labels.

Shapes: n examples.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from influence_kit.core.dtypes import HALF
from influence_kit.data.class_labels import IGNORED_LABEL, logits_of
from influence_kit.errors import InvalidArgumentError

# the tolerance of slopes, relative to the largest
SLOPES_CLOSE = 1e-2

# each example's losses summed, and their number, both ``[n]``; None if the shapes do not fit
OwnFormula = Callable[[Tensor, Tensor], tuple[Tensor, Tensor] | None]


def example_means(formula: OwnFormula, outputs: Any, batch: Any) -> Tensor:
    """The formula's loss of each example, ``[n]``; 0 for an example without labels."""
    found = formula(logits_of(outputs), batch["labels"])
    assert found is not None
    sums, counts = found
    return sums / counts.clamp(min=1)


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


def same_slopes(formula: OwnFormula, outputs: Any, labels: Tensor, own: Tensor) -> bool:
    """Whether a formula and a model's own loss have the same gradient at the logits, if any.

    If a model's head is zero, all formulas have the same values, and only gradients differ.
    """
    logits = logits_of(outputs)
    if not (logits.requires_grad and own.requires_grad):
        return True
    (expected,) = torch.autograd.grad(own, logits, retain_graph=True, allow_unused=True)
    if expected is None:  # the loss was computed from a copy
        return True
    leaf = logits.detach().requires_grad_()
    with torch.enable_grad():
        found = formula(leaf, labels)
        assert found is not None
        (slopes,) = torch.autograd.grad(found[0].sum() / found[1].sum(), leaf)
    close = SLOPES_CLOSE * expected.abs().max()
    return bool(((slopes - expected).abs() <= close).all())


def compare_own(formula: OwnFormula, outputs: Any, labels: Tensor, where: str) -> None:
    """Compare a model's own loss of a batch with the formula that it was found to follow.

    Raises:
        InvalidArgumentError: if they differ.
    """
    own = outputs.get("loss") if isinstance(outputs, Mapping) else None
    own = getattr(outputs, "loss", None) if own is None else own
    found = formula(logits_of(outputs), labels)
    if not isinstance(own, Tensor) or found is None:
        return
    sums, counts = found
    means = sums / counts.clamp(min=1)
    # means over the labelled positions of all examples, and over examples
    expected = sums.sum() / counts.sum()
    either = torch.stack([expected, means.mean(), means[counts > 0].mean()]).to(own)
    close = 3e-2 if _is_half(own) else 1e-4
    if torch.isfinite(own) and not bool(torch.isclose(either, own, close, 1e-6).any()):
        raise InvalidArgumentError(
            f"{where}: the model's own loss is {own.item():.6g}, but the mean over its labelled "
            f"positions, which it equalled in earlier batches, is {expected.item():.6g}: the loss "
            "per example is not known. Pass a `loss_fn` with one value per example"
        )


def _is_half(value: Tensor) -> bool:
    """Whether a number, of any dtype, is exact in half precision."""
    return any(bool(value == value.to(half).to(value)) for half in HALF)


# the likeliest first
OWN_FORMULAS: tuple[OwnFormula, ...] = (next_token_losses, token_losses, class_losses)
