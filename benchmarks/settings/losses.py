"""Losses of single examples, and measurements, of which higher is better.

Shapes: n examples, t positions, c classes.
"""

from torch import Tensor
from torch.nn import functional as F

from influence_kit.data.class_labels import IGNORED_LABEL


def class_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of each example, ``[n]``, from logits ``[n, c]``."""
    return F.cross_entropy(logits, labels, reduction="none")


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy of each example's tokens, ``[n]``, from logits ``[n, t, c]``."""
    losses = F.cross_entropy(
        logits.transpose(1, 2), targets, ignore_index=IGNORED_LABEL, reduction="none"
    )
    return losses.sum(1) / (targets != IGNORED_LABEL).sum(1)


def log_likelihoods(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean log-probability of each example's tokens, ``[n]``."""
    return -token_losses(logits, targets)


def squared_losses(predictions: Tensor, targets: Tensor) -> Tensor:
    """Half the squared error of each example, ``[n]``, from predictions ``[n, 1]``."""
    return 0.5 * squared_errors(predictions, targets)


def closeness(predictions: Tensor, targets: Tensor) -> Tensor:
    """Minus half the squared error of each example, ``[n]``."""
    return -squared_losses(predictions, targets)


def squared_errors(predictions: Tensor, targets: Tensor) -> Tensor:
    """The squared error of each example, ``[n]``, from predictions ``[n, 1]``."""
    return (predictions - targets).square().flatten(1).sum(1)


def minus_squared_errors(predictions: Tensor, targets: Tensor) -> Tensor:
    """Minus the squared error of each example, ``[n]``."""
    return -squared_errors(predictions, targets)
