"""The backward pass of models in half precision, in which gradients vanish or overflow.

float16 holds numbers from 6e-8 to 65504, and log-probabilities to three digits: the loss of a
well-fitted example has a gradient of 0 in it. So outputs in half precision are passed to the loss
in float32, and in float16 the slopes of the loss are multiplied by powers of two that bring them
into the middle of the range. Gradients are divided by these powers in float32.

Shapes: n examples.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from influence_kit.core.dtypes import HALF, exact
from influence_kit.data.batches import Batch, map_outputs, map_tensors, with_item
from influence_kit.errors import InvalidArgumentError
from influence_kit.losses.loss import Loss

# the exponent to which the largest slope at the outputs is scaled: 2^15 would be infinite
START = 10
# how much it is lowered if gradients within the model overflow, and how often at most
STEP, TRIES = 5, 10
# per-example gradients below SMALLEST are scaled again, up to the exponent HIGHEST
SMALLEST, HIGHEST = 2.0**-8, 40


class SummedLoss(NamedTuple):
    """The sum of the examples' losses, and the outputs that it was computed from.

    Attributes:
        value: the sum, a scalar.
        heads: the outputs, in float32 if they were in half precision.
        is_half: whether some were in float16.
    """

    value: Tensor
    heads: list[Tensor]
    is_half: bool

    def gradients(
        self, wanted: Sequence[Any], parameters: Iterable[Tensor]
    ) -> Sequence[Tensor | None]:
        """The gradients at tensors, or at edges of the graph; None if unused.

        If outputs or parameters are in float16, the gradients are scaled in the backward pass and
        returned in float32.
        """
        if not self.is_half and not has_float16(parameters):
            return self._pulled(wanted, keep=False)
        slopes = [slope for _, slope in self._slopes()]
        largest = torch.stack([slope.abs().max() for slope in slopes] or [self.value.new_ones(())])
        powers = START - _exponents(largest.max())

        def scaled(lower: int) -> Sequence[Tensor | None]:
            return self._replaced(self.value * torch.exp2(powers - lower))._pulled(wanted)

        found, lower = _first_finite(scaled, self.value)
        return [None if g is None else g.float() * torch.exp2(lower - powers) for g in found]

    def gradients_by_example(
        self, wanted: Sequence[Any], parameters: Iterable[Tensor], n: int
    ) -> tuple[Sequence[Tensor | None], Tensor | None]:
        """The gradients, and the powers of two ``[n]`` by which to multiply each example's.

        In float16 each example has its own scale, if the outputs show which rows are its own. The
        powers are None if there is nothing to multiply by.
        """
        parameters = list(parameters)
        if not self.is_half and not has_float16(parameters):
            return self._pulled(wanted, keep=False), None
        pairs = self._slopes()
        if not pairs or not all(_counts_examples(head, n) for head, _ in pairs):
            return self.gradients(wanted, parameters), None
        heads, slopes = zip(*pairs, strict=True)
        largest = torch.stack([slope.reshape(n, -1).abs().amax(1) for slope in slopes])
        powers = START - _exponents(largest.amax(0))

        def scaled(lower: int) -> Sequence[Tensor | None]:
            factors = torch.exp2(powers - lower)
            back = [s * factors.view(-1, *[1] * (s.dim() - 1)) for s in slopes]
            return torch.autograd.grad(heads, wanted, back, retain_graph=True, allow_unused=True)

        found, lower = _first_finite(scaled, self.value)
        return [None if g is None else g.float() for g in found], lower - powers

    def _replaced(self, value: Tensor) -> "SummedLoss":
        return SummedLoss(value, self.heads, self.is_half)

    def _pulled(self, wanted: Sequence[Any], keep: bool = True) -> Sequence[Tensor | None]:
        found: Sequence[Tensor | None] = torch.autograd.grad(
            self.value, wanted, retain_graph=keep or None, allow_unused=True
        )
        return found

    def _slopes(self) -> list[tuple[Tensor, Tensor]]:
        """The outputs on which the sum depends, with its slopes there."""
        if not self.heads:
            return []
        pairs = zip(self.heads, self._pulled(self.heads), strict=True)
        return [(head, slope) for head, slope in pairs if slope is not None]


def summed_loss(
    outputs: Any, batch: Batch, loss: Loss, n: int, where: str | None = None
) -> SummedLoss:
    """The sum of the examples' losses, computed in float32 for outputs in half precision.

    Args:
        outputs: the model's outputs.
        batch: the batch.
        loss: the loss.
        n: the number of examples.
        where: the name of the batch, to check its reduced loss; None for no check.
    """
    total = loss.total if where is None else partial(loss.checked_total, where=where)
    heads: list[Tensor] = []
    dtypes: set[torch.dtype] = set()

    def single(tensor: Tensor) -> Tensor:
        dtypes.add(tensor.dtype)
        tensor = exact(tensor)
        if tensor.is_floating_point() and tensor.requires_grad:
            heads.append(tensor)
        return tensor

    shown, is_half = map_outputs(outputs, single), torch.float16 in dtypes
    if dtypes.isdisjoint(HALF):
        value = total(outputs, batch, n)
        if value.is_complex():
            raise InvalidArgumentError(
                f"`{loss.name}` returned {value.dtype}, but a loss must be a real number: return "
                "the real part or the absolute value"
            )
        return SummedLoss(value, heads, is_half)
    if isinstance(batch, Mapping):
        known: Batch = map_tensors(batch, exact)
    else:
        known = with_item(batch, len(batch) - 1, map_tensors(batch[-1], exact))
    try:
        return SummedLoss(total(shown, known, n), heads, is_half)
    except RuntimeError:  # the loss may have its own weights in half precision
        return SummedLoss(total(outputs, batch, n), [], is_half)


def has_float16(tensors: Iterable[Tensor]) -> bool:
    """Whether any of the tensors is in float16."""
    return any(tensor.dtype is torch.float16 for tensor in tensors)


def scaled_examples(
    gradients: Callable[[Tensor], Sequence[Tensor]], n: int, like: Tensor
) -> list[Tensor]:
    """Per-example gradients in float32, computed with a suitable scale for each example's loss.

    Args:
        gradients: returns per-example gradients ``[n, ...]`` of the losses times scales ``[n]``.
        n: the number of examples.
        like: a tensor on the device of the gradients.
    """
    powers = torch.full((n,), float(START), device=like.device)
    for _ in range(TRIES):
        found = gradients(torch.exp2(powers))
        sizes = torch.stack([g.reshape(n, -1).abs().amax(1) for g in found]).amax(0)
        over, low = ~torch.isfinite(sizes), (sizes < SMALLEST) & (powers < HIGHEST)
        if not bool((over | low).any()):
            break
        powers = powers - STEP * over.float() + START * low.float()
    else:
        found = gradients(torch.exp2(powers))
    shape = [-1] + [1] * max(g.dim() - 1 for g in found)
    return [g.float() * torch.exp2(-powers).view(shape[: g.dim()]) for g in found]


def _counts_examples(head: Tensor, n: int) -> bool:
    """Whether the first dimension, and no other, has the length of a batch of n examples."""
    return head.shape[:1] == (n,) and n not in head.shape[1:]


def _exponents(largest: Tensor) -> Tensor:
    """The exponents of non-negative numbers; 0 for zeros and numbers that are not finite."""
    powers = torch.frexp(largest.float()).exponent.float()
    return powers.masked_fill((largest == 0) | ~torch.isfinite(largest), 0)


def _first_finite(
    scaled: Callable[[int], Sequence[Tensor | None]], loss: Tensor
) -> tuple[Sequence[Tensor | None], int]:
    """The result of ``scaled`` at the least lowering of the exponent that makes it finite."""
    found, lower = scaled(0), 0
    # a loss that is not finite has no finite gradient
    while lower < STEP * TRIES and bool(torch.isfinite(loss)):
        if all(bool(torch.isfinite(gradient).all()) for gradient in found if gradient is not None):
            break
        lower += STEP
        found = scaled(lower)
    return found, lower
