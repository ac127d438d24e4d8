"""Refuses a loss without a graph, whose gradients would wrongly be taken for zero.

Chosen parameters on which a batch's loss does not depend (an expert that was not selected, a layer
that was skipped) do have gradient zero. The two cases are distinguished by whether the loss has a
graph when all parameters of the model require gradients. A model that uses other weights in
evaluation mode (an average of the trained ones) is refused, too: in training mode the loss has a
graph.
"""

from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from influence_kit.data.batches import Batch, call_model, map_outputs
from influence_kit.errors import InvalidArgumentError
from influence_kit.losses.loss import Loss
from influence_kit.preservation.module_state import Values, set_flags


def uses_in_graph(total: Tensor) -> Counter[Tensor]:
    """How often a sum uses each parameter: the number of its graph's edges that end there."""
    uses: Counter[Tensor] = Counter()
    waiting: list[Any] = [total.grad_fn]
    seen = set(waiting)
    while waiting:
        for node, _ in waiting.pop().next_functions:
            variable = getattr(node, "variable", None)
            if variable is not None:
                uses[variable] += 1
            elif node is not None and node not in seen:
                seen.add(node)
                waiting.append(node)
    return uses


def depends(total: Tensor, tensors: Iterable[Tensor]) -> bool:
    """Whether a graph leads from a scalar to any of the tensors (a new tensor's does not)."""
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    if not total.requires_grad or not wanted:
        return False
    found = torch.autograd.grad(total, wanted, retain_graph=True, allow_unused=True)
    return any(gradient is not None for gradient in found)


def refuse_without_graph(
    model: nn.Module, chosen: Iterable[Tensor], batch: Batch, loss: Loss, n: int
) -> None:
    """Refuse a batch whose loss does not depend on any parameter of the model, chosen or not.

    Args:
        model: the model.
        chosen: the parameters on which the loss is known not to depend now.
        batch: the batch.
        loss: its loss.
        n: the number of its examples.

    Raises:
        InvalidArgumentError: for such a loss, and for one that depends on chosen parameters in
            training mode only.
    """
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        for parameter in wanted:
            parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
        with torch.enable_grad():
            outputs = call_model(model, batch)
            total = loss.total(outputs, batch, n)
        if depends(total, wanted):
            if _counts_in_training(model, wanted, chosen, batch, loss, n):
                raise InvalidArgumentError(
                    "the loss depends on the chosen parameters in training mode, but not in "
                    "evaluation mode, in which the model uses other weights (an average of the "
                    "trained ones, say). All gradients would be 0; pass eval_mode=False with the "
                    "model in training mode, or a model whose parameters are those other weights"
                )
            return
    finally:
        for parameter, value in wanted.items():
            parameter.requires_grad_(value)
    found: list[Tensor] = []
    map_outputs(outputs, found.append)
    if loss.is_of_outputs and any(tensor.requires_grad for tensor in found):
        raise InvalidArgumentError(
            f"`{loss.name}` returned a value without a graph, though the model's output has one: "
            "it is detached, computed under torch.no_grad() or through .item() or numpy, a new "
            "tensor (torch.tensor(value, requires_grad=True)), or a count (an accuracy, a "
            "comparison, argmax). All its gradients would be 0; compute it from the outputs by "
            "differentiable operations"
        )
    raise InvalidArgumentError(
        "the model returned an output without a graph to any of its parameters: its forward runs "
        "under torch.no_grad() or torch.inference_mode(), detaches, or returns labels (argmax). "
        "All gradients would be 0; let forward return the outputs that the loss is computed from, "
        "with their graph"
    )


def _counts_in_training(
    model: nn.Module,
    parameters: Iterable[Tensor],
    chosen: Iterable[Tensor],
    batch: Batch,
    loss: Loss,
    n: int,
) -> bool:
    """Whether the loss depends on a chosen parameter if all training flags are set."""
    flags = {module: module.training for module in model.modules()}
    if all(flags.values()):
        return False
    values, own = Values(list(flags)), list(chosen)
    numbers = set(map(id, own))
    try:
        for parameter in parameters:
            parameter.requires_grad_(id(parameter) in numbers)
        set_flags(dict.fromkeys(flags, True))
        with suppress(Exception), torch.enable_grad():  # BatchNorm fails on one example, say
            return depends(loss.total(call_model(model, batch), batch, n), own)
        return False
    finally:
        set_flags(flags)
        values.restore()
