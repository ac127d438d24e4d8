"""Rules: the per-example gradients of each kind of layer.

A rule is a pure function registered for a layer type::

    @gradient_rule(nn.Linear)
    def linear(layer, inputs, delta, n):
        ...
        return {"weight": form, "bias": form}

It takes the layer, the tensors that the layer was called with, the gradient ``delta`` of the summed
loss at its output, and the number ``n`` of examples; the first dimension of all tensors is n times
some whole number, an example's items next to each other. It returns one form per parameter of the
layer, by attribute name; forms of parameters that are not needed (frozen, or None) are ignored.
Rules also apply to subclasses: ``check`` compares each with autograd before it is trusted.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from influence_kit.core.arguments import check_function, shown
from influence_kit.errors import InvalidArgumentError
from influence_kit.gradients.convolved import Convolved
from influence_kit.gradients.factored import Factored
from influence_kit.gradients.form import Form
from influence_kit.gradients.forms import Dense
from influence_kit.gradients.rows import Rows

# the first argument is a layer of the type that the rule is registered for
Rule = Callable[[Any, Sequence[Tensor], Tensor, int], Mapping[str, Form]]

_RULES: dict[type | str, Rule] = {}


def gradient_rule(*layer_types: type | str) -> Callable[[Rule], Rule]:
    """Register a rule for layer types (full names for packages that are not imported here).

    Raises:
        InvalidArgumentError: for layer types that are neither classes of modules nor names, or a
            rule that is not a function.
    """
    for kind in layer_types:
        if not isinstance(kind, str) and not (
            isinstance(kind, type) and issubclass(kind, nn.Module)
        ):
            raise InvalidArgumentError(
                "a gradient rule is for classes of torch.nn.Module, or their full names; got "
                f"{shown(kind)}"
            )

    def register(rule: Rule) -> Rule:
        check_function(rule, "rule", "rule(layer, inputs, delta, n) -> forms")
        for layer_type in layer_types:
            _RULES[layer_type] = rule
        return rule

    return register


def rule_for(layer: nn.Module) -> Rule | None:
    """The rule of the layer's type or of its nearest base class; None if there is none."""
    for base in type(layer).__mro__:
        rule = _RULES.get(base) or _RULES.get(f"{base.__module__}.{base.__qualname__}")
        if rule is not None:
            return rule
    return None


def _per_example(values: Tensor, n: int, shape: torch.Size) -> Dense:
    """The sum over each example's items of values whose last dimensions are the parameter's."""
    return Dense(values.reshape(n, -1, shape.numel()).sum(1), shape)


@gradient_rule(nn.Linear)
def linear(layer: nn.Linear, inputs: Sequence[Tensor], delta: Tensor, n: int) -> dict[str, Form]:
    """Y = W x + b: dW = sum_t delta_t x_t^T, db = sum_t delta_t."""
    weight = layer.weight
    deltas = delta.reshape(n, -1, weight.shape[0])
    form = Factored(deltas, inputs[0].reshape(n, -1, weight.shape[1]), weight.shape)
    return {"weight": form, "bias": Dense(deltas.sum(1), weight.shape[:1])}


@gradient_rule("transformers.pytorch_utils.Conv1D")
def transposed_linear(
    layer: Any, inputs: Sequence[Tensor], delta: Tensor, n: int
) -> dict[str, Form]:
    """Y = W^T x + b, the weight stored as (in, out): GPT-2's ``Conv1D``."""
    weight = layer.weight
    deltas = delta.reshape(n, -1, weight.shape[1])
    inputs_ = inputs[0].reshape(n, -1, weight.shape[0])
    form = Factored(deltas, inputs_, weight.shape, transposed=True)
    return {"weight": form, "bias": Dense(deltas.sum(1), weight.shape[1:])}


@gradient_rule(nn.Bilinear)
def bilinear(
    layer: nn.Bilinear, inputs: Sequence[Tensor], delta: Tensor, n: int
) -> dict[str, Form]:
    """Y_k = x1^T A_k x2 + b_k: a linear layer over the products of the two inputs."""
    weight = layer.weight
    products = (inputs[0].unsqueeze(-1) * inputs[1].unsqueeze(-2)).reshape(n, -1, weight[0].numel())
    deltas = delta.reshape(n, -1, weight.shape[0])
    form = Factored(deltas, products, weight.shape)
    return {"weight": form, "bias": Dense(deltas.sum(1), weight.shape[:1])}


@gradient_rule(nn.Embedding)
def embedding(
    layer: nn.Embedding, inputs: Sequence[Tensor], delta: Tensor, n: int
) -> dict[str, Form]:
    """The gradient of a looked-up row is delta; the padding row has none."""
    ids = inputs[0].reshape(n, -1)
    deltas = delta.reshape(n, ids.shape[1], -1)
    if layer.padding_idx is not None:
        deltas = deltas * (ids != layer.padding_idx).unsqueeze(-1)
    if layer.scale_grad_by_freq:
        deltas = deltas / _counts(ids).unsqueeze(-1)
    return {"weight": Rows.from_lookups(ids, deltas, layer.weight.shape)}


def _counts(ids: Tensor) -> Tensor:
    """How often each id ``[n, t]`` occurs in its example."""
    keys = ids + torch.arange(len(ids), device=ids.device)[:, None] * (ids.max() + 1)
    _, inverse, counts = keys.unique(return_inverse=True, return_counts=True)
    found: Tensor = counts[inverse]
    return found


@gradient_rule(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def convolution(layer: Any, inputs: Sequence[Tensor], delta: Tensor, n: int) -> dict[str, Form]:
    """The weight's gradient at kernel offset k: output gradient times the input shifted by k."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(inputs[0], _padding(layer), mode=mode)
    form = Convolved(delta, padded, layer.weight.shape, layer.stride, layer.dilation, layer.groups)
    return {"weight": _map_items(form, n), "bias": _channel_sums(delta, n)}


def _padding(layer: Any) -> list[int]:
    """The padding of each side, last dimension first, as for ``F.pad``."""
    sides: list[int] = []
    sizes = zip(layer.kernel_size, layer.dilation, strict=True)
    for dim, (kernel, dilation) in reversed(list(enumerate(sizes))):
        if layer.padding == "same":
            whole = dilation * (kernel - 1)
            sides += [whole // 2, whole - whole // 2]
        elif layer.padding == "valid":
            sides += [0, 0]
        else:
            sides += [layer.padding[dim]] * 2
    return sides


@gradient_rule(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def transposed_convolution(
    layer: Any, inputs: Sequence[Tensor], delta: Tensor, n: int
) -> dict[str, Form]:
    """``convolution`` with the two maps exchanged: the padded output gradient is shifted."""
    # an output may end before the last window (stride > kernel): pad with zeros, which add nothing
    sides: list[int] = []
    for dim in reversed(range(len(layer.kernel_size))):
        before = layer.padding[dim]
        reach = (inputs[0].shape[2 + dim] - 1) * layer.stride[dim]
        reach += layer.dilation[dim] * (layer.kernel_size[dim] - 1) + 1
        sides += [before, max(before, reach - before - delta.shape[2 + dim])]
    form = Convolved(
        inputs[0],
        F.pad(delta, sides),
        layer.weight.shape,
        layer.stride,
        layer.dilation,
        layer.groups,
    )
    return {"weight": _map_items(form, n), "bias": _channel_sums(delta, n)}


def _map_items(form: Convolved, n: int) -> Form:
    """From one row per item to one per example, summing an example's items (frames of a film)."""
    if form.n == n:
        return form.compact()
    return _per_example(form.dense(), n, form.shape)


def _channel_sums(values: Tensor, n: int) -> Dense:
    """Maps ``[n * items, c, *positions]`` summed over all but examples and channels."""
    by_channel = values.reshape(*values.shape[:2], -1).sum(2)
    return _per_example(by_channel, n, torch.Size([values.shape[1]]))


@gradient_rule(nn.LayerNorm, "torch.nn.modules.normalization.RMSNorm")  # RMSNorm: from torch 2.4
def last_dims_norm(layer: Any, inputs: Sequence[Tensor], delta: Tensor, n: int) -> dict[str, Form]:
    """Y = w * x^ + b over the last dimensions: dw = sum_t delta_t x^_t, db = sum_t delta_t."""
    shape = torch.Size(layer.normalized_shape)
    if isinstance(layer, nn.LayerNorm):
        normal = F.layer_norm(inputs[0], layer.normalized_shape, eps=layer.eps)
    else:
        eps = torch.finfo(layer.weight.dtype).eps if layer.eps is None else layer.eps
        normal = F.rms_norm(inputs[0], layer.normalized_shape, eps=eps)
    return {
        "weight": _per_example(delta * normal, n, shape),
        "bias": _per_example(delta, n, shape),
    }


@gradient_rule(nn.GroupNorm)
def group_norm(
    layer: nn.GroupNorm, inputs: Sequence[Tensor], delta: Tensor, n: int
) -> dict[str, Form]:
    """Y = w * x^ + b by channel, x^ normal within groups of channels."""
    normal = F.group_norm(inputs[0], layer.num_groups, eps=layer.eps)
    return {"weight": _channel_sums(delta * normal, n), "bias": _channel_sums(delta, n)}


@gradient_rule(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
def instance_norm(layer: Any, inputs: Sequence[Tensor], delta: Tensor, n: int) -> dict[str, Form]:
    """Y = w * x^ + b by channel, x^ normal within each channel (or by the running statistics)."""
    own = layer.training or not layer.track_running_stats
    normal = F.instance_norm(
        inputs[0], layer.running_mean, layer.running_var, None, None, own, 0.0, layer.eps
    )
    return {"weight": _channel_sums(delta * normal, n), "bias": _channel_sums(delta, n)}


@gradient_rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
def batch_norm(layer: Any, inputs: Sequence[Tensor], delta: Tensor, n: int) -> dict[str, Form]:
    """Y = w * x^ + b by channel, x^ normal by the running statistics (evaluation mode)."""
    normal = F.batch_norm(inputs[0], layer.running_mean, layer.running_var, eps=layer.eps)
    return {"weight": _channel_sums(delta * normal, n), "bias": _channel_sums(delta, n)}
