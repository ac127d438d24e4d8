"""The model in float64 for a few examples: rounding then hides no wrong gradient, and feigns none.

Autocast leaves float64 alone, so that what runs in half precision inside it runs in float64 too.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn

from influence_kit.core.memory import free_bytes
from influence_kit.data.batches import Batch, call_model, map_tensors
from influence_kit.losses.loss import Loss

Widen = Callable[[Batch], Batch]


def as_float64(batch: Batch) -> Batch:
    """The batch with its floating-point tensors in float64."""
    wide: Batch = map_tensors(batch, _wide)
    return wide


def _wide(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


@contextmanager
def in_float64(model: nn.Module, loss: Loss, batch: Batch) -> Iterator[Batch | None]:
    """The model and the loss in float64 inside, and the batch; None where that does not run.

    It is None for a model that is in float64, that does not fit the memory twice, or that computes
    in a precision of its own (it makes float32 tensors in its forward, say).
    """
    tensors = _narrow_tensors([model, *loss.modules])
    if not _may_widen(model, tensors):
        yield None
        return
    narrow, runs = [tensor.data for tensor in tensors], False
    try:
        for tensor in tensors:
            tensor.data = tensor.data.double()
        wide = as_float64(batch)
        runs = _runs(model, loss, wide)
        if runs:
            yield wide
    finally:
        for tensor, data in zip(tensors, narrow, strict=True):
            tensor.data = data
    if not runs:  # the model is as it was
        yield None


def _narrow_tensors(modules: Sequence[nn.Module]) -> list[Tensor]:
    """Parameters and buffers of real floating-point numbers below float64, each once."""
    found = {
        id(tensor): tensor
        for module in modules
        for tensor in (*module.parameters(), *module.buffers())
        if tensor.is_floating_point() and tensor.dtype != torch.float64
    }
    return list(found.values())


def _may_widen(model: nn.Module, tensors: Sequence[Tensor]) -> bool:
    if not tensors or hasattr(model, "_orig_mod"):  # a compiled model would be compiled again
        return False
    device = tensors[0].device
    return device.type != "mps" and 16 * sum(t.numel() for t in tensors) < free_bytes(device)


def _runs(model: nn.Module, loss: Loss, batch: Batch) -> bool:
    with torch.no_grad(), torch.random.fork_rng(devices=[]), suppress(Exception):
        loss.values(call_model(model, batch), batch)
        return True
    return False
