"""No graph is not a gradient of zero: a loss that nothing can be differentiated through is refused.

Chosen parameters that have no part in a batch's loss (an expert that was not asked, a layer that
was skipped) do have gradient zero. The two are told apart by whether the loss has a graph when all
parameters of the model want gradients. A model that works with other weights in evaluation mode (an
average of those that are trained) is refused, too: in training mode the loss has a graph.
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
    """How often a sum depends on each parameter, by the edges of its graph that end there."""
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
    """Whether a graph leads from a scalar to any of the tensors; one made anew has its own."""
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    if not total.requires_grad or not wanted:
        return False
    found = torch.autograd.grad(total, wanted, retain_graph=True, allow_unused=True)
    return any(gradient is not None for gradient in found)


def refuse_without_graph(
    model: nn.Module, chosen: Iterable[Tensor], batch: Batch, loss: Loss, n: int
) -> None:
    """An error where the loss of a batch depends on no parameter of the model, chosen or not.

    Args:
        model: the model.
        chosen: the parameters of which the loss is known not to depend now.
        batch: the batch.
        loss: its loss.
        n: the number of its examples.

    Raises:
        InvalidArgumentError: also where it depends on chosen ones in training mode alone.
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
                    "in evaluation mode no chosen parameter has a part in the loss, and in "
                    "training mode they do: the model works with other weights then (an average "
                    "of those that are trained, say). All gradients would be 0; pass "
                    "eval_mode=False with the model in training mode, or a model whose parameters "
                    "are those weights"
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
            "it is detached, computed under torch.no_grad() or through .item() or numpy, made anew "
            "(torch.tensor(value, requires_grad=True)), or counts (an accuracy, a comparison, "
            "argmax). All its gradients would be 0; compute it from the outputs by operations that "
            "have a derivative"
        )
    raise InvalidArgumentError(
        "the model returned an output without a graph to any of its parameters: its forward runs "
        "under torch.no_grad() or torch.inference_mode(), detaches, or returns labels (argmax). "
        "All gradients would be 0; have forward return what the loss is computed from, with its "
        "graph"
    )


def _counts_in_training(
    model: nn.Module,
    parameters: Iterable[Tensor],
    chosen: Iterable[Tensor],
    batch: Batch,
    loss: Loss,
    n: int,
) -> bool:
    """Whether the loss depends on a chosen parameter where flags say training."""
    flags = {module: module.training for module in model.modules()}
    if all(flags.values()):
        return False
    values, own = Values(list(flags)), list(chosen)
    numbers = set(map(id, own))
    try:
        for parameter in parameters:
            parameter.requires_grad_(id(parameter) in numbers)
        set_flags(dict.fromkeys(flags, True))
        with suppress(Exception), torch.enable_grad():  # normalization of one example, say
            return depends(loss.total(call_model(model, batch), batch, n), own)
        return False
    finally:
        set_flags(flags)
        values.restore()
