"""One meaning for every loss: the sum over examples of the loss of each example alone.

A loss per example, a sum or a mean over examples all describe the same losses l_1 .. l_n, and a
gradient of ``Loss.total`` at something that belongs to example i is the gradient of l_i. A mean over
anything else (tokens, with padding; examples weighted by class) does not, and is refused.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from influence_kit.data import Batch, targets_of
from influence_kit.errors import InvalidArgumentError

LossFunction = Callable[[Any, Any], Tensor]
IGNORED_LABEL = -100  # of torch's and Hugging Face's cross-entropy


def declared_reduction(
    loss_fn: LossFunction | None, sample_wise: bool | None, name: str = "loss_fn"
) -> str | None:
    """"none", "sum" or "mean", or None where only a call can tell.

    ``sample_wise`` None takes any loss; True and False keep the rules of Captum's
    ``sample_wise_grads_per_batch``.
    """
    if loss_fn is None:
        return None
    known = getattr(loss_fn, "reduction", None)
    if sample_wise is None:
        return known if known in ("none", "sum", "mean") else None
    wanted = ("sum", "mean") if sample_wise else ("none",)
    if known in wanted:
        return known
    flag = f"`sample_wise_grads_per_batch` is {sample_wise}"
    words = " or ".join(f'"{word}"' for word in wanted)
    if known is not None:
        raise InvalidArgumentError(
            f'reduction for `{name}` must be {words} when {flag}; got "{known}". Leave '
            "`sample_wise_grads_per_batch` out to use a loss of any reduction"
        )
    meaning = "the sum over the batch" if sample_wise else "one loss an example"
    warnings.warn(
        f"`{name}` has no attribute `reduction`; since {flag}, it is taken to return {meaning}",
        stacklevel=4,
    )
    return wanted[0]


class Loss:
    """A user's loss, called one way: ``total`` of a model's outputs and a batch.

    Args:
        loss_fn: called with the outputs and the targets (of a dict batch: the dict). None takes the
            outputs themselves, or, of a dict batch, the loss that the model returns.
        reduction: "none", "sum", "mean", or None to find out from the first batch.
        name: what to call it in errors.
    """

    def __init__(self, loss_fn: LossFunction | None, reduction: str | None, name: str) -> None:
        self.reduction = reduction
        self.name = name
        self._formula = self._model_loss if loss_fn is None else loss_fn
        self._is_models_own = loss_fn is None
        self.settled = False

    def values(self, outputs: Any, batch: Batch) -> Tensor:
        """What the loss returns, checked to be a tensor."""
        value = self._formula(outputs, targets_of(batch))
        if not isinstance(value, Tensor):
            raise InvalidArgumentError(
                f"`{self.name}` must return a tensor; got a {type(value).__name__}"
            )
        return value

    def total(self, outputs: Any, batch: Batch, n: int) -> Tensor:
        """The sum over the examples of their losses, a scalar."""
        value = self.values(outputs, batch)
        if value.dim() == 0:
            if self.reduction == "none":
                raise InvalidArgumentError(
                    f"Loss function is applying a reduction. `{self.name}` was said to return one "
                    f"loss an example and returned a scalar for {n} examples"
                )
            return value * n if self.reduction == "mean" else value
        if self.reduction in ("sum", "mean"):
            raise InvalidArgumentError(
                f'`{self.name}` was said to return the {self.reduction} over the batch and returned '
                f"a tensor of shape {list(value.shape)}"
            )
        if value.shape[0] != n:
            raise InvalidArgumentError(
                f"`{self.name}` returned a tensor of shape {list(value.shape)} for {n} examples; "
                "its first dimension must be the examples (reshape token losses to [n, tokens])"
            )
        return value.sum()

    def _model_loss(self, outputs: Any, targets: Any) -> Tensor:
        """Without a ``loss_fn``: the loss in the model's output, or the output itself."""
        if isinstance(targets, Mapping) and not isinstance(outputs, Tensor):
            loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
            loss = getattr(outputs, "loss", None) if loss is None else loss
            if loss is None:
                raise InvalidArgumentError(
                    f"the model returned a {type(outputs).__name__} without a loss; put the labels "
                    "into the batch so that the model computes it, or pass `loss_fn`"
                )
            return loss
        if isinstance(outputs, Tensor):
            return outputs
        raise InvalidArgumentError(
            f"without a `loss_fn` the model's output is differentiated, which must be a tensor; the "
            f"model returned a {type(outputs).__name__}: pass `loss_fn`"
        )

    def settle(
        self, together: tuple[Any, Batch], alone: list[tuple[Any, Batch]], closeness: float
    ) -> None:
        """Find out, or check, what a reduced loss reduces over.

        Args:
            together: outputs and batch of a few examples at once.
            alone: outputs and batch of each of them by itself.
            closeness: relative difference that rounding explains.

        Raises:
            InvalidArgumentError: where the loss of a batch is not the sum or mean of its examples' losses.
        """
        n = len(alone)
        value = self.values(*together)
        if value.dim() > 0:
            self.settled = True
            return
        singles = torch.stack([self.values(*one).sum() for one in alone])
        if self._is_models_own and self._take_formula(together, singles, closeness):
            return
        scale = closeness * singles.abs().max() * n
        found = [
            word
            for word, expected in (("mean", singles.mean()), ("sum", singles.sum()))
            if self.reduction in (None, word) and bool((value - expected).abs() <= scale)
        ]
        if not found:
            self._refuse(value, singles)
        # one example, or losses that are all zero, are their sum and their mean
        self.settled = n > 1 and (self.reduction is not None or len(found) == 1)
        if self.settled:
            self.reduction = found[0]

    def _refuse(self, value: Tensor, singles: Tensor) -> None:
        word = self.reduction or "sum or mean"
        raise InvalidArgumentError(
            f"`{self.name}` is not a {word} over examples: {len(singles)} examples together have "
            f"{float(value):.6g}, each alone {[round(float(v), 6) for v in singles]}. A mean over "
            "tokens with padding or over examples weighted by class has no loss per example: pass a "
            "loss with one value an example (reduction='none', shape [n] or [n, tokens])"
        )

    def _take_formula(
        self, together: tuple[Any, Batch], singles: Tensor, closeness: float
    ) -> bool:
        """Replace a model's own mean by a per-example formula that gives each example's loss."""
        outputs, batch = together
        logits = getattr(outputs, "logits", None)
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if not isinstance(logits, Tensor) or not isinstance(labels, Tensor):
            return False
        for formula in (_next_token_losses, _token_losses, _class_losses):
            losses = formula(outputs, batch)
            if losses is not None and torch.allclose(losses, singles.to(losses), closeness, 1e-12):
                self._formula, self.reduction, self.settled = formula, "none", True
                return True
        return False


def _token_losses(outputs: Any, batch: Any, shift: int = 0) -> Tensor | None:
    """Each sequence's mean cross-entropy over its labelled tokens, ``[n]``."""
    logits, labels = outputs.logits, batch["labels"]
    if logits.dim() != 3 or labels.shape != logits.shape[:2]:
        return None
    logits, labels = logits[:, : logits.shape[1] - shift], labels[:, shift:]
    losses = F.cross_entropy(
        logits.transpose(1, 2), labels, ignore_index=IGNORED_LABEL, reduction="none"
    )
    return losses.sum(1) / (labels != IGNORED_LABEL).sum(1).clamp(min=1)


def _next_token_losses(outputs: Any, batch: Any) -> Tensor | None:
    """The same where position t predicts label t + 1."""
    return _token_losses(outputs, batch, shift=1)


def _class_losses(outputs: Any, batch: Any) -> Tensor | None:
    """Cross-entropy of one class an example, ``[n]``."""
    logits, labels = outputs.logits, batch["labels"]
    if logits.dim() != 2 or labels.dim() != 1 or labels.is_floating_point():
        return None
    return F.cross_entropy(logits, labels, reduction="none")
