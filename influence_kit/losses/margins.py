"""Output functions that TRAK differentiates in place of a loss: margins of the label's class.

Shapes: n examples, t positions, c classes.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from influence_kit.core.arguments import shown
from influence_kit.core.dtypes import exact
from influence_kit.core.scaling import balanced, times_powers
from influence_kit.data.batches import Batch, map_tensors, targets_of
from influence_kit.data.class_labels import check_labels, labels_of, logits_of, with_logits
from influence_kit.errors import InvalidArgumentError
from influence_kit.losses.loss import Loss

OutputFunction = Callable[[Any, Any], Tensor]


def classification_margin(outputs: Any, targets: Any, shift: int | None = None) -> Tensor:
    """Log p - log(1 - p) of the labels' probability p in a softmax: z_y - log sum_{j != y} e^z_j.

    It is computed from the logits, so it is finite where p rounds to 1. For sequences it is summed
    over positions; negative labels are ignored. Higher is better: it is a ``test_output_fn``, not a
    loss.

    Args:
        outputs: logits ``[n, c]``, ``[n, t, c]`` (assumed if t = c) or ``[n, c, t]``, or a model's
            output that has ``logits``.
        targets: integer labels ``[n]`` or ``[n, t]``, or a dict that holds them.
        shift: by how many positions labels lag behind logits: 1 for a causal language model, whose
            labels are its inputs. None means 0, and is refused where a shift is possible.

    Returns:
        ``[n]``.

    Raises:
        InvalidArgumentError: for targets that are not class labels, or have no positions to shift.
        LabelError: for a label outside the classes.
    """
    margins, counts = _margins(outputs, targets, shift)
    return (margins * counts).sum(1)


def margin_terms(
    outputs: Any, targets: Any, shift: int | None = None
) -> tuple[Tensor, Tensor] | None:
    """The margin of each token, and whether it is labelled, ``[n, t]``, in the columns of labels.

    None for one label per example.
    """
    labels = targets if isinstance(targets, Tensor) else labels_of(targets)
    if labels.dim() != 2:
        return None
    margins, counts = _margins(outputs, targets, shift)
    values, counted = (F.pad(x, (shift or 0, 0)) for x in (margins * counts, counts))
    return values, counted > 0


def one_minus_probability(outputs: Any, targets: Any, shift: int | None = None) -> Tensor:
    """1 - p of the labels' probability, ``[n]``; for sequences the mean over labelled positions."""
    margins, counts = _margins(outputs, targets, shift)
    wrong = torch.sigmoid(-margins)
    return (wrong * counts).sum(1) / counts.sum(1).clamp(min=1)


def _margins(outputs: Any, targets: Any, shift: int | None) -> tuple[Tensor, Tensor]:
    """The margin of each label, and 1 if it counts, else 0, ``[n, 1]`` or ``[n, t]``."""
    if shift is not None and (type(shift) is not int or shift < 0):
        raise InvalidArgumentError(
            f"`shift` must be None, or a number of positions for labels [n, t]; got {shown(shift)}"
        )
    if not isinstance(targets, Tensor | Mapping):
        raise _refusal(f"the targets are a {type(targets).__name__}, not a tensor of labels")
    try:
        logits = exact(logits_of(outputs))
        labels = targets if isinstance(targets, Tensor) else labels_of(targets)
    except InvalidArgumentError as error:
        raise _refusal(str(error)) from None
    if any(t.is_meta or t.layout != torch.strided for t in (logits, labels)):
        raise _refusal("the outputs or targets are a sparse or meta tensor")
    if not logits.is_floating_point():
        raise _refusal(f"the outputs are {logits.dtype}, for which there is no softmax")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise _refusal(f"the targets are {labels.dtype}, not class labels")
    if logits.dim() == labels.dim() + 1 and logits.dim() > 2 and logits.shape[:-1] != labels.shape:
        logits = logits.movedim(1, -1)
    if logits.shape[:-1] != labels.shape or logits.shape[-1] < 2:
        raise _refusal(
            f"outputs of shape {list(logits.shape)} are not logits of two or more classes for "
            f"labels of shape {list(labels.shape)}"
        )
    if shift is None and logits.dim() == 3 and _has_own_loss(outputs):
        raise InvalidArgumentError(
            "the model computes its own loss from token labels, which may compare the logits at a "
            "position with the next label: pass shift=1 for a causal language model, shift=0 for "
            "labels of the tokens themselves"
        )
    if shift not in (None, 0):
        if labels.dim() != 2:
            raise InvalidArgumentError(
                f"`shift` must be None, or a number of positions for labels [n, t]; got "
                f"{shown(shift)} for labels of shape {list(labels.shape)}"
            )
        logits, labels = logits[:, :-shift], labels[:, shift:]
    check_labels(labels, logits.shape[-1])
    counts = labels >= 0
    indices = labels.clamp(min=0).long().unsqueeze(-1)
    right = logits.gather(-1, indices).squeeze(-1)
    others = logits.scatter(-1, indices, float("-inf")).logsumexp(-1)
    n = len(labels)
    return (right - others).reshape(n, -1), counts.to(logits).reshape(n, -1)


def _has_own_loss(outputs: Any) -> bool:
    held = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    return not isinstance(outputs, Tensor) and held is not None


def _refusal(why: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"the margin of a classifier does not fit ({why}); pass `output_fn(outputs, targets)`, "
        "which returns one value per example, higher for better predictions"
    )


def slope_along(
    loss: Loss, output_fn: OutputFunction, outputs: Any, batch: Batch, n: int
) -> Tensor:
    """-dL/df ``[n]`` of each example's loss L along its output function f, at the model's outputs.

    The slope by least squares, -<dL/dz, df/dz> / |df/dz|^2 over an example's logits z: exact if L
    is a function of f.
    """
    logits = exact(logits_of(outputs)).detach().requires_grad_()
    shown = with_logits(outputs, logits)
    with torch.enable_grad():
        # the function may write into its arguments
        copies = map_tensors((shown, targets_of(batch)), Tensor.clone)
        along = _gradient(output_fn(*copies).sum(), logits, "output_fn")
        down = _gradient(loss.checked_total(shown, batch, n), logits, loss.name)
    along, powers = balanced(along.reshape(n, -1))
    down, of_down = balanced(down.reshape(n, -1))
    product, square = (along * down).sum(1), along.square().sum(1)
    # 0 where the output function has a zero gradient
    return times_powers(-product / square.masked_fill(square == 0, 1), of_down - powers)


def _gradient(value: Tensor, logits: Tensor, name: str) -> Tensor:
    if not value.requires_grad:
        raise InvalidArgumentError(
            f"`{name}` is not a function of the model's output (its `logits`), so the loss has no "
            "slope along `output_fn`; compute it from the logits"
        )
    return torch.autograd.grad(value, logits)[0]
