"""What is known of torch's own losses: their labels, the weights in their means, squared errors.

Shapes: n examples.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from influence_kit.data.class_labels import IGNORED_LABEL, check_labels

CROSS_ENTROPIES = (nn.CrossEntropyLoss, nn.NLLLoss)


def check_class_labels(loss: Any, outputs: Any, targets: Any) -> None:
    """Refuse labels that torch's cross-entropy cannot look up: a GPU would not name them."""
    ignored = loss.ignore_index if isinstance(loss, CROSS_ENTROPIES) else IGNORED_LABEL
    # a subclass may reshape outputs and targets
    plain = type(loss) in CROSS_ENTROPIES or loss in (F.cross_entropy, F.nll_loss)
    labels = plain and isinstance(targets, Tensor) and not targets.is_floating_point()
    if labels and isinstance(outputs, Tensor) and outputs.dim() > 0:
        check_labels(targets, outputs.shape[min(1, outputs.dim() - 1)], ignored)


def unequal_shares(loss: Any, targets: Any, n: int) -> list[float] | None:
    """The weights of a batch's examples in a mean of torch's cross-entropy; None if they are equal.

    To be checked in every batch: a single one may hold only one class, or no padding.
    """
    labels = isinstance(targets, Tensor) and not targets.is_floating_point()
    if n == 1 or not labels or not isinstance(loss, CROSS_ENTROPIES):
        return None
    kept = targets != loss.ignore_index
    weights = kept if loss.weight is None else loss.weight[targets.where(kept, 0)] * kept
    shares = weights.reshape(n, -1).sum(1, dtype=torch.float64)
    if torch.allclose(shares, shares[:1], 1e-6):
        return None
    return [round(x, 6) for x in shares.tolist()]


def squared_errors(loss_fn: nn.MSELoss, outputs: Any, targets: Any) -> Tensor:
    """``nn.MSELoss`` by plain arithmetic: torch's own cannot be differentiated often enough."""
    if loss_fn.reduction == "none" or outputs.shape != targets.shape:
        value: Tensor = loss_fn(outputs, targets)
        return value
    squares: Tensor = (outputs - targets).square()
    return squares.mean() if loss_fn.reduction == "mean" else squares.sum()


def only_reads(formula: Any) -> bool:
    """Whether a loss is torch's or ours, and so never changes its arguments."""
    while isinstance(formula, partial):
        formula = formula.func
    named = formula if hasattr(formula, "__qualname__") else type(formula)
    home = str(getattr(named, "__module__", None))
    return home.startswith(("torch.nn.", "influence_kit."))
