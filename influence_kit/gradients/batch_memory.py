"""The memory of examples in a forward and backward pass, and how many to run in one batch."""

import math

import torch
from torch import Tensor, nn

from influence_kit.core.memory import rows_within, workspace_bytes
from influence_kit.data.batches import Batch, call_model, take

MOST_ROWS = 2048


def comfortable_rows(model: nn.Module, batch: Batch, device: torch.device) -> int:
    """How many examples like the batch's first to run in one batch."""
    # saved activations, the gradients at the same points, and products of the two
    rows = rows_within(4 * workspace_bytes(device), 2 * kept_bytes(model, batch))
    # matrix products are fastest if rows are a power of two
    return min(MOST_ROWS, 1 << round(math.log2(rows)))


def kept_bytes(model: nn.Module, batch: Batch) -> int:
    """The bytes that the model saves for the backward pass of the batch's first example."""
    kept: dict[int, int] = {}
    parameters = {parameter.data_ptr() for parameter in model.parameters()}

    def count(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    one = take(batch, slice(0, 1))
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        call_model(model, one)
    return sum(kept.values())
