"""Random losses of outputs and targets; each means, on a batch of one, that example's loss."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fuzz.draw import Draw

Loss = Callable[[Any, Any], Tensor]


def reduced(losses: Loss, how: str) -> Loss:
    """The user's own function of losses ``[n, ...]``: as they are, summed, or their mean."""

    def per_example(o: Any, t: Any) -> Tensor:
        found = losses(o, t)
        return found.flatten(1).sum(1) if found.dim() > 1 else found

    if how == "none":
        return losses
    return lambda o, t: getattr(per_example(o, t), how)()


def draw_loss(draw: Draw, kind: str, classes: int, ragged: bool, dtype: torch.dtype) -> Loss:
    """A loss for outputs of a kind; ``ragged`` where some labels of a sequence are ignored."""
    how = draw.one(["none", "sum", "mean"])
    draw.note(f"loss {how}")
    makers = {"class": _of_classes, "regress": _of_numbers, "many": _of_many, "tokens": _of_tokens}
    draw.ragged, draw.classes, draw.dtype = ragged, classes, dtype
    return makers[kind](draw, how)


def _focal(o: Tensor, t: Tensor) -> Tensor:
    log_p = -F.cross_entropy(o, t, reduction="none")
    return -((1 - log_p.exp()) ** 2) * log_p


def _of_classes(draw: Draw, how: str) -> Loss:
    w = torch.rand(draw.classes, dtype=draw.dtype) + 0.2

    def weighted(draw: Draw) -> Loss:
        if how == "mean":
            draw.note("weighted mean")
            draw.excuse("a mean weighted by class")
        # a module's weight does not follow the oracle's precision through a closure
        if draw.dtype is torch.float64 and draw.chance(0.5):
            return nn.CrossEntropyLoss(weight=w, reduction=how)
        return lambda o, t: F.cross_entropy(o, t, weight=w.to(o), reduction=how)

    def focal(draw: Draw) -> Loss:
        if how != "mean" or draw.chance(0.5):
            return reduced(_focal, how)
        draw.note("mean of alphas")
        draw.excuse("a mean weighted by class")
        return lambda o, t: (w[t].to(o) * _focal(o, t)).sum() / w[t].to(o).sum()

    makers: dict[str, tuple[float, Callable[[Draw], Loss]]] = {
        "CrossEntropyLoss": (3, lambda d: nn.CrossEntropyLoss(reduction=how)),
        "F.cross_entropy": (2, lambda d: lambda o, t: F.cross_entropy(o, t, reduction=how)),
        "label smoothing": (1, lambda d: nn.CrossEntropyLoss(label_smoothing=0.1, reduction=how)),
        "weighted": (2, weighted),
        "focal": (1, focal),
        "nll": (1, lambda d: lambda o, t: F.nll_loss(o.log_softmax(1), t, reduction=how)),
        "margin": (1, lambda d: nn.MultiMarginLoss(p=2, reduction=how)),
    }
    return draw.call(makers)


def _of_numbers(draw: Draw, how: str) -> Loss:
    makers: dict[str, tuple[float, Callable[[Draw], Loss]]] = {
        "MSELoss": (3, lambda d: nn.MSELoss(reduction=how)),
        "F.mse_loss": (1, lambda d: lambda o, t: F.mse_loss(o, t, reduction=how)),
        "HuberLoss": (1, lambda d: nn.HuberLoss(delta=2.0, reduction=how)),
        "SmoothL1Loss": (1, lambda d: nn.SmoothL1Loss(reduction=how)),
        "squares": (1, lambda d: reduced(lambda o, t: (o - t) ** 2, how)),
        "log cosh": (1, lambda d: reduced(lambda o, t: (o - t).cosh().log(), how)),
    }
    return draw.call(makers)


def _of_many(draw: Draw, how: str) -> Loss:
    w = torch.rand(draw.classes, dtype=draw.dtype) + 0.2
    makers: dict[str, tuple[float, Callable[[Draw], Loss]]] = {
        "BCEWithLogitsLoss": (3, lambda d: nn.BCEWithLogitsLoss(reduction=how)),
        "pos_weight": (1, lambda d: nn.BCEWithLogitsLoss(pos_weight=w, reduction=how)),
        "BCE": (1, lambda d: lambda o, t: F.binary_cross_entropy(o.sigmoid(), t, reduction=how)),
        "soft margin": (1, lambda d: reduced(lambda o, t: F.softplus(-(2 * t - 1) * o), how)),
    }
    return draw.call(makers)


def token_losses(o: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(o.transpose(1, 2), t, reduction="none")


def _of_tokens(draw: Draw, how: str) -> Loss:
    def over_tokens(draw: Draw) -> Loss:
        if how == "mean" and draw.ragged:
            draw.note("mean over tokens")
            draw.excuse("a mean over tokens")
        return nn.CrossEntropyLoss(reduction=how)

    def flat(draw: Draw) -> Loss:
        if how == "mean" and draw.ragged:
            draw.note("mean over tokens")
            draw.excuse("a mean over tokens")
        if how == "none":
            draw.excuse("one loss a token without the examples' dimension")
        return lambda o, t: F.cross_entropy(o.flatten(0, 1), t.flatten(), reduction=how)

    def own_means(draw: Draw) -> Loss:
        def losses(o: Tensor, t: Tensor) -> Tensor:
            return token_losses(o, t).sum(1) / (t != -100).sum(1)

        return reduced(losses, how)

    makers: dict[str, tuple[float, Callable[[Draw], Loss]]] = {
        "tokens": (2, lambda d: reduced(token_losses, how)),
        "CrossEntropyLoss of tokens": (2, over_tokens),
        "flat tokens": (2, flat),
        "means of tokens": (2, own_means),
    }
    loss = draw.call(makers)
    if isinstance(loss, nn.Module):
        return lambda o, t: loss(o.transpose(1, 2), t)
    return loss
