"""Compares a batch's reduced loss with those of two parts: is it a sum or mean over examples?

Only the loss is called again, on parts of the existing outputs.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from influence_kit.data.batches import Batch, map_outputs, take
from influence_kit.errors import InvalidArgumentError

Values = Callable[[Any, Batch], Tensor]


def compare_parts(
    values: Values, outputs: Any, batch: Batch, value: Tensor, n: int, reduction: str | None
) -> str | None:
    """Why a loss of n examples is not their sum or mean, in words; None if it is.

    Args:
        values: the loss of outputs and a batch.
        outputs: the model's outputs, without a graph.
        batch: the batch.
        value: the batch's loss, a scalar.
        n: the number of its examples.
        reduction: "sum", "mean", or None to accept either.
    """
    if not bool(value.isfinite()):
        return None  # the check of scores will name the example
    order = _order(n, value.device)
    parts = order[: n // 2], order[n // 2 :]
    difference = None
    for axis in (0, 1):
        losses = [loss_of_some(values, outputs, batch, rows, n, axis) for rows in parts]
        found = [loss for loss in losses if loss is not None]
        if len(found) < 2:
            continue
        difference = _difference(value, found, [len(rows) for rows in parts], n, reduction)
        if difference is None:
            return None
    return difference


def _order(n: int, device: torch.device) -> Tensor:
    """A fixed random order of n examples, which depends on n only."""
    generator = torch.Generator().manual_seed(n)
    return torch.randperm(n, generator=generator).to(device)


def loss_of_some(
    values: Values, outputs: Any, batch: Batch, rows: Tensor, n: int, axis: int
) -> Tensor | None:
    """The loss of some examples; None if the outputs cannot be cut along that axis."""
    cut: list[bool] = []

    def part(tensor: Tensor) -> Tensor:
        if tensor.dim() > axis and tensor.shape[axis] == n:
            cut.append(True)
            return tensor.index_select(axis, rows.to(tensor.device))
        if axis == 0 and tensor.dim() > 0 and tensor.shape[0] % n == 0:
            cut.append(True)
            return tensor.reshape(n, -1, *tensor.shape[1:])[rows.to(tensor.device)].flatten(0, 1)
        return tensor

    some = map_outputs(outputs, part)
    if not cut:
        return None
    try:
        return values(some, take(batch, rows))
    except InvalidArgumentError:
        raise
    except Exception:  # shapes that do not fit; those of the other axis may
        return None


def _difference(
    value: Tensor, losses: list[Tensor], counts: list[int], n: int, reduction: str | None
) -> str | None:
    if any(loss.dim() > 0 for loss in losses):
        return None
    whole, parts = value.item(), [loss.item() for loss in losses]
    close = {torch.float64: 1e-8, torch.float32: 1e-4}.get(value.dtype, 3e-2)
    weights = {"sum": (1, [1, 1]), "mean": (n, counts)}
    for word in ("sum", "mean") if reduction not in weights else (reduction,):
        times, of_parts = weights[word]
        weighted = [w * loss for w, loss in zip(of_parts, parts, strict=True)]
        scale = max(abs(times * whole), *(abs(part) for part in weighted))
        if abs(times * whole - math.fsum(weighted)) <= close * scale + 1e-12:
            return None
    return (
        f"the batch of {n} examples has the loss {whole:.6g}, and two parts of it, of {counts[0]} "
        f"and {counts[1]}, have {parts[0]:.6g} and {parts[1]:.6g}"
    )
