"""No graph is not a gradient of zero: a loss that nothing can be differentiated through is refused.

Chosen parameters that have no part in a batch's loss (an expert that was not asked, a layer that
was skipped) do have gradient zero. The two are told apart by whether the loss has a graph when all
parameters of the model want gradients.
"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from influence_kit.data import Batch, call_model, map_outputs
from influence_kit.errors import InvalidArgumentError
from influence_kit.losses import Loss


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


def refuse_without_graph(model: nn.Module, batch: Batch, loss: Loss, n: int) -> None:
    """An error where the loss of a batch depends on no parameter of the model, chosen or not."""
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        for parameter in wanted:
            parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
        with torch.enable_grad():
            outputs = call_model(model, batch)
            if loss.total(outputs, batch, n).requires_grad:
                return
    finally:
        for parameter, value in wanted.items():
            parameter.requires_grad_(value)
    found: list[Tensor] = []
    map_outputs(outputs, found.append)
    if loss.is_of_outputs and any(tensor.requires_grad for tensor in found):
        raise InvalidArgumentError(
            f"`{loss.name}` returned a value without a graph, though the model's output has one: "
            "it is detached, computed under torch.no_grad() or through .item() or numpy, or counts "
            "(an accuracy, a comparison, argmax). All its gradients would be 0; compute it from "
            "the outputs by operations that have a derivative"
        )
    raise InvalidArgumentError(
        "the model returned an output without a graph to any of its parameters: its forward runs "
        "under torch.no_grad() or torch.inference_mode(), detaches, or returns labels (argmax). "
        "All gradients would be 0; have forward return what the loss is computed from, with its "
        "graph"
    )
