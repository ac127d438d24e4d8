"""What a model's own loss may be: formulas of a loss per example, of its logits and labels.

Letters: n examples.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from influence_kit.labels import IGNORED_LABEL

# the sum of each example's losses and how many there are, ``[n]``; None where the shapes do not fit
OwnFormula = Callable[[Tensor, Tensor], tuple[Tensor, Tensor] | None]


def example_means(formula: OwnFormula, outputs: Any, batch: Any) -> Tensor:
    """The formula's loss of each example, ``[n]``; 0 where nothing is labelled."""
    found = formula(outputs.logits, batch["labels"])
    assert found is not None
    sums, counts = found
    return sums / counts.clamp(min=1)


def token_losses(logits: Tensor, labels: Tensor, shift: int = 0) -> tuple[Tensor, Tensor] | None:
    """Each sequence's cross-entropy over its labelled tokens, summed, and their number, ``[n]``."""
    if logits.dim() != 3 or labels.shape != logits.shape[:2]:
        return None
    logits, labels = logits[:, : logits.shape[1] - shift], labels[:, shift:]
    losses = F.cross_entropy(
        logits.transpose(1, 2), labels, ignore_index=IGNORED_LABEL, reduction="none"
    )
    return losses.sum(1), (labels != IGNORED_LABEL).sum(1)


def next_token_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor] | None:
    """The same where position t predicts label t + 1."""
    return token_losses(logits, labels, shift=1)


def class_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor] | None:
    """Cross-entropy of one class an example, and 1, ``[n]``."""
    if logits.dim() != 2 or labels.dim() != 1 or labels.is_floating_point():
        return None
    return F.cross_entropy(logits, labels, reduction="none"), torch.ones_like(labels)


# the likeliest first
OWN_FORMULAS: tuple[OwnFormula, ...] = (next_token_losses, token_losses, class_losses)
