"""The loss of an example as a sum of terms, one per token.

Shapes: n examples of a batch, t tokens of each, c classes.

    loss_j = sum_s term_js

A mean over the labelled tokens of an example is a sum of terms, each divided by their number. The
terms of a language model's own loss are in the columns of their labels: the term in column s is the
loss of predicting token s, which is computed from the logits at s - 1.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from influence_kit.data.batches import Batch, example_count, map_tensors, targets_of
from influence_kit.data.class_labels import logits_of
from influence_kit.errors import InvalidArgumentError
from influence_kit.losses.example_losses import UNREDUCED
from influence_kit.losses.loss import Loss
from influence_kit.losses.margins import classification_margin, margin_terms
from influence_kit.losses.measures import RaisedOutput
from influence_kit.losses.model_losses import labelled_losses

# relative difference between the sum of the terms and the loss that rounding explains
CLOSE = 1e-4

# the terms [n, t], and which of them count
Found = tuple[Tensor, Tensor | None]


class Terms(NamedTuple):
    """The terms of the losses of a batch.

    Attributes:
        values: ``[n, t]``, with a graph; minus the terms of an output that should rise.
        counted: the columns that may hold a term other than zero.
    """

    values: Tensor
    counted: list[int]


class TermLoss(Loss):
    """One term of each example's loss, as a loss.

    Args:
        loss: the loss.
        column: the index of the token.
    """

    def __init__(self, loss: Loss, column: int) -> None:
        super().__init__(loss.returned, "none", loss.name)
        self.settled = True
        self._whole, self._column = loss, column

    @property
    def compares(self) -> bool:
        """False: the whole loss has been compared."""
        return False

    def values(self, outputs: Any, batch: Batch) -> Tensor:
        """The term of each example, ``[n]``."""
        return _terms(self._whole, outputs, batch)[0][:, self._column]


def term_values(loss: Loss, outputs: Any, batch: Batch) -> Tensor:
    """The terms of the losses of a batch ``[n, t]``, with a graph, not compared with their sum."""
    return _terms(loss, outputs, batch)[0]


def terms_of(loss: Loss, outputs: Any, batch: Batch) -> Terms:
    """The terms of the losses of a batch.

    Args:
        loss: the loss, whose reduction has been found.
        outputs: the model's outputs.
        batch: the batch.

    Raises:
        InvalidArgumentError: if the loss does not have a term for each token, or the terms that it
            declares do not sum to it.
    """
    values, labelled = _terms(loss, outputs, batch)
    n = example_count(batch)
    total = loss.total(outputs, batch, n).detach().double()
    summed = values.detach().double()
    if (summed.sum() - total).abs() > CLOSE * max(summed.abs().sum(), total.abs()):
        raise InvalidArgumentError(
            f"the terms of `{loss.name}` sum to {summed.sum().item():.6g}, and it returns "
            f"{total.item():.6g} for the same examples: `terms` must return [n, t] whose rows sum "
            "to the value of each example"
        )
    if labelled is None:
        return Terms(values, list(range(values.shape[1])))
    return Terms(values, labelled.any(0).nonzero()[:, 0].tolist())


def _terms(loss: Loss, outputs: Any, batch: Batch) -> Found:
    """The terms ``[n, t]``, and which of them count; None if all may."""
    targets = targets_of(batch)
    ways = (_own, _declared, _of_margin, _of_entries)
    found = next((f for f in (way(loss, outputs, targets) for way in ways) if f is not None), None)
    if found is None:
        values = loss.values(outputs, batch)
        if values.dim() < 2:
            _refuse(loss, values)
        found = _by_column(values), None
    values, counted = found
    return -values if isinstance(loss, RaisedOutput) else values, counted


def _refuse(loss: Loss, values: Tensor) -> None:
    raise InvalidArgumentError(
        f"`{loss.name}` returned a tensor of shape {list(values.shape)}, which does not show the "
        'term of each token: per_token="test_terms" needs a function that returns [n, t] (a loss '
        "with reduction='none' over tokens, for example), or has a method "
        "`terms(outputs, targets)` that does"
    )


def _by_column(values: Tensor) -> Tensor:
    return values.flatten(2).sum(2) if values.dim() > 2 else values


def _own(loss: Loss, outputs: Any, targets: Any) -> Found | None:
    """The terms of the loss that a model computes itself, from its labelled tokens."""
    own = loss.own_of_tokens
    if own is None:
        return None
    logits, labels = logits_of(outputs), targets["labels"]
    shift = loss.shift
    losses, counted = labelled_losses(logits, labels, shift)
    values = own.reading.examples(losses, counted.sum(1, keepdim=True))
    # in the columns of the labels, without a soft prompt that the model prepends
    width = labels.shape[1]
    values, counted = (F.pad(x, (shift, 0))[:, -width:] for x in (values, counted))
    return values, counted


def _declared(loss: Loss, outputs: Any, targets: Any) -> Found | None:
    """The terms that a function of the user's returns in its method ``terms``."""
    terms = getattr(loss.function, "terms", None)
    if not callable(terms):
        return None
    values = terms(*map_tensors((outputs, targets), Tensor.clone))
    if not isinstance(values, Tensor) or values.dim() != 2:
        got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise InvalidArgumentError(f"`terms` of `{loss.name}` must return [n, t]; got {got}")
    return values, None


def _of_margin(loss: Loss, outputs: Any, targets: Any) -> Found | None:
    """The margins of tokens, of which ``classification_margin`` is the sum."""
    function: Any = loss.function
    given: Any = {}
    if isinstance(function, partial) and not function.args:
        function, given = function.func, function.keywords
    if function is not classification_margin or set(given) - {"shift"}:
        return None
    return margin_terms(outputs, targets, **given)


def _of_entries(loss: Loss, outputs: Any, targets: Any) -> Found | None:
    """The terms of a mean or sum by one of torch's losses, ``[n, t]`` in its entries."""
    function = loss.function
    reduction = getattr(function, "reduction", None)
    if type(function) not in UNREDUCED or reduction not in ("mean", "sum"):
        return None
    entries: Any = copy.copy(function)
    entries.reduction = "none"
    values = entries(outputs, targets)
    if values.dim() < 2:
        return None
    counted = None
    weights = torch.ones_like(values)
    if isinstance(function, nn.CrossEntropyLoss | nn.NLLLoss) and not targets.is_floating_point():
        counted = targets != function.ignore_index
        weights = weights * counted
        if function.weight is not None:
            weights = function.weight[targets.where(counted, 0)] * counted
        counted = counted.flatten(2).any(2) if counted.dim() > 2 else counted
    if reduction == "mean":  # examples have equal shares, or the loss is refused
        values = values * (len(values) / weights.sum())
    return _by_column(values), counted
