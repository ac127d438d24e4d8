"""Per-example gradients of parameters without a rule, by ``torch.func``.

They are slower than a rule (each example's gradient is written out, in its own pass) and right for
any module that ``torch.func.vmap`` accepts; other modules run one example at a time.
"""

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from influence_kit.core.dtypes import exact, real, real_shape
from influence_kit.core.memory import rows_within, workspace_bytes
from influence_kit.data.batches import (
    Batch,
    call_arguments,
    call_model,
    map_tensors,
    take,
    tensor_axes,
    with_count,
)
from influence_kit.gradients.forms import Dense
from influence_kit.gradients.graph import refuse_without_graph
from influence_kit.gradients.loss_scaling import has_float16, scaled_examples, summed_loss
from influence_kit.losses.loss import Loss

# activations of a whole model are held for every example of a chunk
MOST_EXAMPLES_AT_ONCE = 64


def vmapped(
    model: nn.Module, parameters: Mapping[str, Tensor], batch: Batch, loss: Loss, n: int
) -> dict[str, Dense]:
    """Per-example gradients of the named parameters by ``vmap(grad)``."""
    axes = tensor_axes(batch)
    tensors: list[Tensor] = []
    without_graph: list[bool] = []
    map_tensors(batch, tensors.append)
    if len(axes) != len(tensors):
        raise NotImplementedError("a packed sequence cannot be cut into examples")

    def example_loss(values: dict[str, Tensor], scale: Tensor, *one: Tensor) -> Tensor:
        # tensors whose example dimension vmap removed get one of length 1 back
        supply = iter(zip(one, axes, strict=True))

        def restore(_: Tensor) -> Tensor:
            tensor, axis = next(supply)
            return tensor if axis is None else tensor.unsqueeze(axis)

        example = with_count(map_tensors(batch, restore), 1)
        args, kwargs = call_arguments(model, example)
        outputs = functional_call(model, values, args, kwargs)
        total = summed_loss(outputs, example, loss, 1).value
        without_graph.append(not total.requires_grad)
        return total * scale

    values = {name: parameter.detach() for name, parameter in parameters.items()}
    elements = sum(value.numel() * value.element_size() for value in values.values())
    device = next(iter(values.values())).device
    chunk = min(MOST_EXAMPLES_AT_ONCE, rows_within(4 * workspace_bytes(device), elements))
    per_example = vmap(
        grad(example_loss), in_dims=(None, 0, *axes), chunk_size=chunk, randomness="different"
    )
    scales = torch.ones(n, device=device)
    with warnings.catch_warnings():
        # torch's warning that an operation loops under vmap: the caller has warned already
        warnings.filterwarnings("ignore", message="There is a performance drop")
        try:
            # `grad` differentiates anyway; without no_grad, other parameters would keep a graph
            with torch.no_grad():
                if has_float16(values.values()):
                    found = scaled_examples(
                        lambda scales: [*per_example(values, scales, *tensors).values()], n, scales
                    )
                    gradients = dict(zip(values, found, strict=True))
                else:
                    gradients = per_example(values, scales, *tensors)
        except (IndexError, RuntimeError):
            with torch.no_grad():  # vmap hides values: this call names a label outside the classes
                loss.values(call_model(model, batch), batch)
            raise
    if any(without_graph):
        refuse_without_graph(model, parameters.values(), batch, loss, n)
    return {name: as_dense(gradients[name], real_shape(v)) for name, v in values.items()}


def one_by_one(
    model: nn.Module, parameters: Mapping[str, Tensor], batch: Batch, loss: Loss, n: int
) -> dict[str, Dense]:
    """Per-example gradients of the named parameters, by one pass per example."""
    rows = [
        single_gradients(model, list(parameters.values()), take(batch, slice(i, i + 1)), loss)
        for i in range(n)
    ]
    return {
        name: as_dense(torch.stack([row[index] for row in rows]), real_shape(parameter))
        for index, (name, parameter) in enumerate(parameters.items())
    }


def single_gradients(
    model: nn.Module, parameters: Sequence[Tensor], batch: Batch, loss: Loss, n: int = 1
) -> list[Tensor]:
    """Autograd's own gradients of the batch's total loss; zero for an unused parameter.

    Complex gradients are returned as pairs of real numbers, those in float16 as float32.

    Raises:
        InvalidArgumentError: if the loss does not depend on any parameter of the model.
    """
    with torch.enable_grad():
        total = summed_loss(call_model(model, batch), batch, loss, n)
    found: Sequence[Tensor | None] = [None] * len(parameters)
    if total.value.requires_grad:
        found = total.gradients(parameters, parameters)
    if all(gradient is None for gradient in found):
        refuse_without_graph(model, parameters, batch, loss, n)
    return [
        real(torch.zeros_like(p) if g is None else (g.to_dense() if g.is_sparse else g))
        for p, g in zip(parameters, found, strict=True)
    ]


def as_dense(values: Tensor, shape: torch.Size) -> Dense:
    """Gradients ``[n, *shape]``, complex ones as pairs of real numbers, as a form."""
    return Dense(exact(real(values.detach())).reshape(len(values), -1), shape)
