"""Turns any loss into the sum over examples of the loss of each example alone.

A loss with one value per example, a sum over examples and a mean over examples all define the same
losses l_1 .. l_n, and the gradient of ``Loss.total`` at a tensor that belongs to example i is the
gradient of l_i. A mean over anything else (tokens, with padding; examples weighted by class) does
not define them, and is refused.
"""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from influence_kit.core.arguments import check_flag
from influence_kit.data.batches import Batch, map_outputs, map_tensors, targets_of
from influence_kit.data.class_labels import IGNORED_LABEL, check_labels, label_in
from influence_kit.errors import InvalidArgumentError, LabelError
from influence_kit.losses.model_losses import (
    OWN_FORMULAS,
    OwnFormula,
    compare_own,
    example_means,
    next_token_losses,
    same_slopes,
    token_losses,
)
from influence_kit.losses.reduction_check import compare_parts

LossFunction = Callable[[Any, Any], Tensor]
CROSS_ENTROPIES = (nn.CrossEntropyLoss, nn.NLLLoss)
# losses whose mean is over examples, or is checked from the examples' labels
PLAIN = (*CROSS_ENTROPIES, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCELoss)
NO_EXAMPLE_LOSS = (
    "A mean over tokens with padding or over examples weighted by class has no loss per example: "
    "pass a loss with one value per example (reduction='none', shape [n] or [n, tokens])"
)


def declared_reduction(
    loss_fn: LossFunction | None, sample_wise: bool | None, name: str = "loss_fn"
) -> str | None:
    """The loss's reduction: "none", "sum" or "mean", or None if only a call can show it.

    With ``sample_wise`` None any loss is accepted; True and False follow the rules of Captum's
    ``sample_wise_grads_per_batch``.
    """
    if sample_wise is not None:
        check_flag(sample_wise, "sample_wise_grads_per_batch")
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
    meaning = "the sum over the batch" if sample_wise else "one loss per example"
    warnings.warn(
        f"`{name}` has no attribute `reduction`; since {flag}, it is assumed to return {meaning}",
        stacklevel=4,
    )
    return wanted[0]


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
            self._formula = partial(_squared_errors, loss_fn)
        self._is_models_own = loss_fn is None
        # the formula that the model's own loss was found to follow
        self._own_formula: OwnFormula | None = None
        self.settled = False

    @property
    def shift(self) -> int:
        """By how many positions labels lag behind logits: 1 for a language model's own loss."""
        formula = self._formula
        return int(isinstance(formula, partial) and next_token_losses in formula.args)

    @property
    def is_own_of_tokens(self) -> bool:
        """Whether the model computes the loss, as a mean over labelled tokens."""
        return self._own_formula in (next_token_losses, token_losses)

    @property
    def function(self) -> Any:
        """What is called with outputs and targets: the user's function, if there is one."""
        formula: Any = self._formula
        is_squared = isinstance(formula, partial) and formula.func is _squared_errors
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
        self._check_labels(outputs, targets)
        if not self._is_known_to_read:
            # it may write into its arguments: the user's data, the next call's inputs, a leaf
            outputs, targets = map_tensors((outputs, targets), Tensor.clone)
        return self.returned(outputs, targets)

    @property
    def _is_known_to_read(self) -> bool:
        """Whether the loss is torch's or ours, and so never changes its arguments."""
        formula = self._formula
        while isinstance(formula, partial):
            formula = formula.func
        named = formula if hasattr(formula, "__qualname__") else type(formula)
        home = str(getattr(named, "__module__", None))
        return self._is_models_own or home.startswith(("torch.nn.", "influence_kit."))

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
        return self.reduction != "none" or isinstance(self._formula, partial)

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
        value = self.values(outputs, batch)
        if n > 1 and self.compares:
            shown = map_outputs(outputs, lambda tensor: tensor.detach())
            with torch.no_grad():
                self._compare(shown, batch, value.detach(), n, where)
        return self.summed(value, batch, n)

    def _compare(self, outputs: Any, batch: Batch, value: Tensor, n: int, where: str) -> None:
        if self._own_formula is not None and isinstance(batch, Mapping):
            compare_own(self._own_formula, outputs, batch["labels"], where)
        elif value.dim() == 0 and not self._is_models_own and type(self._formula) not in PLAIN:
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
            self._check_shares(targets_of(batch), n)
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
        if self._is_models_own and self._take_formula(together, singles, closeness):
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

    def _check_labels(self, outputs: Any, targets: Any) -> None:
        """Refuse labels that torch's cross-entropy cannot look up: a GPU would not name them."""
        loss = self._formula
        ignored = loss.ignore_index if isinstance(loss, CROSS_ENTROPIES) else IGNORED_LABEL
        # a subclass may reshape outputs and targets
        plain = type(loss) in CROSS_ENTROPIES or loss in (F.cross_entropy, F.nll_loss)
        labels = plain and isinstance(targets, Tensor) and not targets.is_floating_point()
        if labels and isinstance(outputs, Tensor) and outputs.dim() > 0:
            check_labels(targets, outputs.shape[min(1, outputs.dim() - 1)], ignored)

    def _check_shares(self, targets: Any, n: int) -> None:
        """Refuse a mean of torch's cross-entropy in which a batch's examples weigh differently.

        Checked in every batch: a single one may hold only one class, or no padding.
        """
        loss = self._formula
        labels = isinstance(targets, Tensor) and not targets.is_floating_point()
        if n == 1 or not labels or not isinstance(loss, CROSS_ENTROPIES):
            return
        kept = targets != loss.ignore_index
        weights = kept if loss.weight is None else loss.weight[targets.where(kept, 0)] * kept
        shares = weights.reshape(n, -1).sum(1, dtype=torch.float64)
        if not torch.allclose(shares, shares[:1], 1e-6):
            raise InvalidArgumentError(
                f"`{self.name}` is not a mean over examples: by their classes and tokens, the {n} "
                f"of a batch weigh {[round(x, 6) for x in shares.tolist()]}. {NO_EXAMPLE_LOSS}"
            )

    def _take_formula(self, together: tuple[Any, Batch], singles: Tensor, closeness: float) -> bool:
        """Replace a model's own mean by a per-example formula that gives each example's loss."""
        outputs, batch = together
        held = outputs.get("logits") if isinstance(outputs, Mapping) else None
        logits = getattr(outputs, "logits", None) if held is None else held
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if not isinstance(logits, Tensor) or not isinstance(labels, Tensor):
            return False
        for formula in OWN_FORMULAS:
            found = formula(logits, labels)
            if found is None:
                continue
            # single examples and the batch, as class weights only show in the batch
            whole = found[0].sum() / found[1].sum()
            expected = torch.cat([example_means(formula, outputs, batch), whole.reshape(1)])
            value = self.values(*together)
            own = torch.cat([singles, value.detach().reshape(1)])
            is_same = torch.allclose(expected, own.to(expected), closeness, 1e-12)
            if is_same and same_slopes(formula, outputs, labels, value):
                self._formula = partial(example_means, formula)
                self._own_formula = formula
                self.reduction, self.settled = "none", True
                return True
        return False


def _squared_errors(loss_fn: nn.MSELoss, outputs: Any, targets: Any) -> Tensor:
    """``nn.MSELoss`` by plain arithmetic: torch's own cannot be differentiated often enough."""
    if loss_fn.reduction == "none" or outputs.shape != targets.shape:
        value: Tensor = loss_fn(outputs, targets)
        return value
    squares: Tensor = (outputs - targets).square()
    return squares.mean() if loss_fn.reduction == "mean" else squares.sum()
