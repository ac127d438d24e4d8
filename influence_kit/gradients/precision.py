"""Runs the model in float64 on a few examples, so that rounding cannot hide or mimic errors.

Autocast does not change float64, so operations that run in half precision inside it run in float64,
too.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn

from influence_kit.core.memory import free_bytes
from influence_kit.data.batches import Batch, call_model, map_tensors
from influence_kit.losses.loss import Loss


def as_float64(batch: Batch) -> Batch:
    """The batch with its floating-point tensors in float64."""
    wide: Batch = map_tensors(batch, _wide)
    return wide


def _wide(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


@contextmanager
def in_float64(model: nn.Module, loss: Loss, batch: Batch) -> Iterator[Batch | None]:
    """Inside, the model and the loss are in float64; gives the batch in float64, or None.

    It gives None, and changes nothing, if the model is already in float64, does not fit the memory
    twice, or does not run in float64 (its forward makes float32 tensors, say).
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
    if not runs:  # the model has been restored
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
