"""Turns any loss into the sum over examples of the loss of each example alone.

A loss with one value per example, a sum over examples and a mean over examples all define the same
losses l_1 .. l_n, and the gradient of ``Loss.total`` at a tensor that belongs to example i is the
gradient of l_i. A mean over anything else (tokens, with padding; examples weighted by class) does
not define them, and is refused.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from influence_kit.data.batches import Batch, map_outputs, map_tensors, targets_of
from influence_kit.data.class_labels import label_in
from influence_kit.errors import InvalidArgumentError, LabelError
from influence_kit.losses.model_losses import (
    OwnLoss,
    next_token_losses,
    own_losses,
    still_own,
    token_losses,
)
from influence_kit.losses.reduction_check import compare_parts
from influence_kit.losses.torch_losses import (
    CROSS_ENTROPIES,
    check_class_labels,
    only_reads,
    squared_errors,
    unequal_shares,
)

LossFunction = Callable[[Any, Any], Tensor]
# losses whose mean is over examples, or is checked from the examples' labels
PLAIN = (*CROSS_ENTROPIES, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCELoss)
NO_EXAMPLE_LOSS = (
    "A mean over tokens with padding or over examples weighted by class has no loss per example: "
    "pass a loss with one value per example (reduction='none', shape [n] or [n, tokens])"
)


class Loss:
    """A user's loss as a sum over examples: ``total`` of a model's outputs and a batch.

    Args:
        loss_fn: called with the outputs and the targets (for a dict batch: the dict). With None,
            the loss is the outputs themselves, or, for a dict batch, the loss that the model
            returns.
        reduction: "none", "sum", "mean", or None to determine it from the first batch.
        name: the name of the argument, for errors.
    """

    def __init__(self, loss_fn: LossFunction | None, reduction: str | None, name: str) -> None:
        self.reduction = reduction
        self.name = name
        self._formula = self._model_loss if loss_fn is None else loss_fn
        if type(loss_fn) is nn.MSELoss:
            self._formula = partial(squared_errors, loss_fn)
        self._is_models_own = loss_fn is None
        # the losses per example that gave the model's own loss in all batches so far
        self._own: list[OwnLoss] = []
        self.settled = False

    @property
    def shift(self) -> int:
        """By how many positions labels lag behind logits: 1 for a language model's own loss."""
        own = self._formula
        return int(isinstance(own, OwnLoss) and own.formula is next_token_losses)

    @property
    def own_of_tokens(self) -> OwnLoss | None:
        """The loss per example that gives the model's own, if it is one of tokens."""
        own = self._formula
        if isinstance(own, OwnLoss) and own.formula in (next_token_losses, token_losses):
            return own
        return None

    @property
    def is_own_by_values(self) -> bool:
        """Whether it is the model's own loss, known as a sum or mean by its values alone."""
        return self._is_models_own and not self._own and self.reduction in ("sum", "mean")

    @property
    def function(self) -> Any:
        """What is called with outputs and targets: the user's function, if there is one."""
        formula: Any = self._formula
        is_squared = isinstance(formula, partial) and formula.func is squared_errors
        return formula.args[0] if is_squared else formula

    @property
    def is_of_outputs(self) -> bool:
        """Whether the loss is a function of the outputs, rather than a part of them."""
        return self._formula != self._model_loss

    @property
    def is_binary(self) -> bool:
        """Whether the loss is the cross-entropy of independent sigmoids."""
        return isinstance(self._formula, nn.BCEWithLogitsLoss)

    def values(self, outputs: Any, batch: Batch) -> Tensor:
        """What the loss returns, checked to be a tensor."""
        targets = targets_of(batch)
        check_class_labels(self._formula, outputs, targets)
        if not (self._is_models_own or only_reads(self._formula)):
            # it may write into its arguments: the user's data, the next call's inputs, a leaf
            outputs, targets = map_tensors((outputs, targets), Tensor.clone)
        return self.returned(outputs, targets)

    def returned(self, outputs: Any, targets: Any) -> Tensor:
        """What the loss returns for these tensors, not copies of them."""
        try:
            value = self._formula(outputs, targets)
        except IndexError as error:
            found = label_in(error, targets)
            if found is None:
                raise
            raise LabelError(f"{found}, which `{self.name}` cannot look up") from error
        except (TypeError, AttributeError) as error:
            if isinstance(outputs, Tensor):
                raise
            hint = "use its `logits`" if hasattr(outputs, "logits") else "use a tensor in it"
            raise InvalidArgumentError(
                f"`{self.name}` failed on what the model returns, a {type(outputs).__name__} "
                f"({error}): {hint}, as in lambda outputs, targets: loss(outputs.logits, targets)"
            ) from error
        if not isinstance(value, Tensor):
            raise InvalidArgumentError(
                f"`{self.name}` must return a tensor; got a {type(value).__name__}"
            )
        return value

    @property
    def modules(self) -> list[nn.Module]:
        """The loss, if it is a module (which may hold class weights); else an empty list."""
        return [self._formula] if isinstance(self._formula, nn.Module) else []

    @property
    def compares(self) -> bool:
        """Whether ``checked_total`` has to compare losses: not for a loss per example."""
        return self.reduction != "none" or bool(self._own)

    def checked_total(self, outputs: Any, batch: Batch, n: int, where: str = "the batch") -> Tensor:
        """``total``, after a check that a reduced loss of this batch is a sum or mean of examples.

        Args:
            outputs: the model's outputs.
            batch: the batch.
            n: the number of its examples.
            where: the name of the batch, for errors.

        Raises:
            InvalidArgumentError: if the loss is neither.
        """
        shown = map_outputs(outputs, lambda tensor: tensor.detach()) if self.compares else None
        if self._own and isinstance(batch, Mapping):
            with torch.no_grad():
                self._take_own(still_own(self._own, shown, batch["labels"], where))
        value = self.values(outputs, batch)
        if n > 1 and self.compares:
            with torch.no_grad():
                self._compare(shown, batch, value.detach(), n, where)
        return self.summed(value, batch, n)

    def _compare(self, outputs: Any, batch: Batch, value: Tensor, n: int, where: str) -> None:
        if value.dim() == 0 and not self._is_models_own and type(self._formula) not in PLAIN:
            difference = compare_parts(self.values, outputs, batch, value, n, self.reduction)
            if difference is not None:
                raise InvalidArgumentError(
                    f"{where}: `{self.name}` is not a {self.reduction or 'sum or mean'} over "
                    f"examples: {difference}. {NO_EXAMPLE_LOSS}"
                )

    def total(self, outputs: Any, batch: Batch, n: int) -> Tensor:
        """The sum over the examples of their losses, a scalar."""
        return self.summed(self.values(outputs, batch), batch, n)

    def summed(self, value: Tensor, batch: Batch, n: int) -> Tensor:
        """The sum over the examples, given what the loss returned."""
        if value.dim() == 0:
            self.check_not_reduced(n)
            if self.reduction is None and n > 1 and value.requires_grad:
                self._refuse_unknown(value, n)
            if self.reduction != "mean":
                return value
            shares = unequal_shares(self._formula, targets_of(batch), n)
            if shares is not None:
                raise InvalidArgumentError(
                    f"`{self.name}` is not a mean over examples: by their classes and tokens, the "
                    f"{n} of a batch weigh {shares}. {NO_EXAMPLE_LOSS}"
                )
            return value * n
        if self.reduction in ("sum", "mean"):
            raise InvalidArgumentError(
                f"`{self.name}` was declared to return the {self.reduction} over the batch and "
                f"returned a tensor of shape {list(value.shape)}"
            )
        if value.shape[0] != n:
            raise InvalidArgumentError(
                f"`{self.name}` returned a tensor of shape {list(value.shape)} for {n} examples; "
                "its first dimension must count the examples (reshape token losses to [n, tokens])"
            )
        return value.sum()

    def _refuse_unknown(self, value: Tensor, n: int) -> None:
        """Refuse a reduced loss whose reduction is not known."""
        try:
            is_informative = bool(value != 0)
        except RuntimeError:  # under a transform that hides values
            return
        if is_informative:
            raise InvalidArgumentError(
                f"`{self.name}` returned one number for {n} examples, and batches of one example, "
                "the only ones so far, do not show whether it is their sum or their mean: declare "
                f'it ({self.name}.reduction = "sum" or "mean"), or return one value per example'
            )

    def _model_loss(self, outputs: Any, targets: Any) -> Tensor:
        """Without a ``loss_fn``: the loss in the model's output, or the output itself."""
        if isinstance(targets, Mapping) and not isinstance(outputs, Tensor):
            loss: Tensor | None = outputs.get("loss") if isinstance(outputs, Mapping) else None
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
            "without a `loss_fn` the model's output is differentiated and must be a tensor; the "
            f"model returned a {type(outputs).__name__}: pass `loss_fn`"
        )

    def settle(
        self, together: tuple[Any, Batch], alone: list[tuple[Any, Batch]], closeness: float
    ) -> None:
        """Determine, or check, the reduction of a reduced loss.

        Args:
            together: outputs and batch of a few examples in one batch.
            alone: outputs and batch of each of them by itself.
            closeness: relative difference that rounding explains.

        Raises:
            InvalidArgumentError: if the batch's loss is not the sum or mean of single losses.
        """
        n = len(alone)
        value = self.values(*together)
        if value.dim() > 0:
            self.settled = True
            return
        self.check_not_reduced(n)
        singles = torch.stack([self.values(*one).sum() for one in alone])
        if not bool(singles.isfinite().all()):
            return  # shows nothing; the check of scores will name the example
        if not singles.is_floating_point():
            return  # integers have no graph; they are refused when they are to be differentiated
        # a model of float64 may compute its loss in float32
        closeness = max(closeness, torch.finfo(singles.dtype).eps ** 0.5)
        # what was the sum or mean of other values in earlier batches is none of the formulas
        is_new = self._is_models_own and self.reduction is None
        if is_new and self._take_formula(together, singles, closeness):
            return
        scale = closeness * singles.abs().max()
        found = [
            word
            for word, count, expected in (("mean", 1, singles.mean()), ("sum", n, singles.sum()))
            if self.reduction in (None, word) and bool((value - expected).abs() <= count * scale)
        ]
        if not found:
            self._refuse(value, singles)
        # for one example, or losses that are all zero, the sum equals the mean
        self.settled = n > 1 and (self.reduction is not None or len(found) == 1)
        if self.settled:
            self.reduction = found[0]

    def _refuse(self, value: Tensor, singles: Tensor) -> None:
        word = self.reduction or "sum or mean"
        alone = [round(loss, 6) for loss in singles.tolist()]
        raise InvalidArgumentError(
            f"`{self.name}` is not a {word} over examples: {len(singles)} examples together have "
            f"{value.item():.6g}, each alone {alone}. {NO_EXAMPLE_LOSS}"
        )

    def check_not_reduced(self, n: int) -> None:
        """Refuse a scalar from a loss per example, unless n is 1 (after a ``squeeze()``, say)."""
        if self.reduction == "none" and n > 1:
            raise InvalidArgumentError(
                f"Loss function is applying a reduction. `{self.name}` was declared to return one "
                f"loss per example and returned a scalar for {n} examples"
            )

    def _take_formula(self, together: tuple[Any, Batch], singles: Tensor, closeness: float) -> bool:
        """Replace a model's own mean by a per-example formula that gives each example's loss."""
        outputs, batch = together
        held = outputs.get("logits") if isinstance(outputs, Mapping) else None
        logits = getattr(outputs, "logits", None) if held is None else held
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if not isinstance(logits, Tensor) or not isinstance(labels, Tensor):
            return False
        value = self.values(*together)
        self._take_own(own_losses(outputs, batch, value, singles, closeness))
        return bool(self._own)

    def _take_own(self, losses: list[OwnLoss]) -> None:
        if losses:
            self._formula, self._own = losses[0], losses
            self.reduction, self.settled = "none", True
