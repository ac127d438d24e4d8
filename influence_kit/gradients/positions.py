"""Gradients by position: each position (token) of an example as an example of its own.

Shapes: n examples of a batch, t positions (tokens) of each, in rows j * t + s of the result.

The gradient of a layer's parameter is a sum over the positions at which the layer acts, such as
``sum_s delta_s a_s^T`` of a linear layer. A rule that is given each position as an example of its
own returns the summands, in factors: no gradient is written out, and there is no other backward
pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from influence_kit.core.dtypes import exact
from influence_kit.core.scaling import scaled_by_powers
from influence_kit.errors import InvalidArgumentError
from influence_kit.gradients import rules
from influence_kit.gradients.capture import Capture, Layer, Use, use_forms
from influence_kit.gradients.form import Form
from influence_kit.gradients.forms import add_forms
from influence_kit.gradients.layouts import ROWS, SECOND, SHARED, arrange
from influence_kit.gradients.per_example import Gradients
from influence_kit.gradients.rule_results import checked_result

# rules that treat all positions alike, by their formulas; the result of others is compared
BY_POSITION = (
    rules.linear,
    rules.transposed_linear,
    rules.bilinear,
    rules.embedding,
    rules.last_dims_norm,
)
# the second dimension of their tensors counts channels, and their positions are not tokens
BY_CHANNEL = (rules.convolution, rules.transposed_convolution)
CLOSE = 1e-4
REMEDY = "name the layers whose token scores you want in `layers`"


class Positions(NamedTuple):
    """Gradients of positions.

    Attributes:
        gradients: ``n * t`` of them, the positions of an example next to each other.
        length: t.
    """

    gradients: Gradients
    length: int


@dataclass(frozen=True)
class _Arranged:
    """A use of a layer, with tensors ``[n, *lengths, ...]``."""

    use: Use
    inputs: list[Tensor]
    delta: Tensor

    @property
    def layer(self) -> Layer:
        return self.use.layer

    @property
    def lengths(self) -> tuple[int, ...]:
        """The lengths of the dimensions between the example's and those of the layer's output."""
        shape = getattr(self.layer.module, "normalized_shape", (1,))
        return tuple(self.delta.shape[1 : max(1, self.delta.dim() - len(shape))])

    @property
    def names(self) -> str:
        return ", ".join(sorted(self.layer.names.values()))


def position_gradients(
    capture: Capture, uses: Sequence[Use], whole: Gradients, checked: set[int]
) -> Positions:
    """The gradients of each position of a batch.

    Args:
        capture: what captured the batch.
        uses: the calls of its layers, with the gradients at their outputs.
        whole: the gradients of the examples.
        checked: the layers, by id, whose summands have been compared with their sum; those of this
            batch are added.

    Raises:
        InvalidArgumentError: for parameters without a gradient per position, and layers that act at
            another number of positions.
    """
    n = whole.n
    if capture.without_rule:
        _refuse(capture.without_rule, "have no gradient per position (no rule of a layer fits)")
    with torch.no_grad():
        parts = [_arranged(use, n) for use in uses]
        for part in parts:
            if part.layer.rule in BY_CHANNEL:
                _refuse(part.layer.names.values(), "are of a convolution, not of tokens")
        count = _count(parts, n)
        forms: dict[str, Form] = {}
        for part in parts:
            found = _forms(part, n, count)
            if id(part.layer) not in checked:
                _compare(part, found, n, count)
                checked.add(id(part.layer))
            add_forms(forms, found)
    return Positions(Gradients(n * count, forms, whole.parameters, whole.sample), count)


def _refuse(names: Any, why: str) -> None:
    listed = sorted(names)
    more = f", ... ({len(listed)} in all)" if len(listed) > 6 else ""
    raise InvalidArgumentError(
        f"no token scores: the parameters {', '.join(listed[:6])}{more} {why}; {REMEDY}"
    )


def _arranged(use: Use, n: int) -> _Arranged:
    layer = use.layer
    inputs = [_leading(exact(x), layer.layout, n, layer.leads) for x in use.inputs]
    # the hook expanded the output of a layer with shared inputs: examples come first
    layout = ROWS if layer.layout == SHARED else layer.layout
    return _Arranged(use, inputs, _leading(exact(use.delta), layout, n, False))


def _leading(tensor: Tensor, layout: str, n: int, leads: bool) -> Tensor:
    """The tensor with the examples in the first dimension, ``[n, ...]``."""
    if n > 1:
        tensor = arrange(tensor, layout, n, leads)
        rows: Tensor = tensor if len(tensor) == n else tensor.reshape(n, -1, *tensor.shape[1:])
        return rows
    if layout == SECOND and tensor.dim() > 1 and tensor.shape[1] == 1:
        return tensor.transpose(0, 1)
    return tensor if tensor.shape[:1] == (1,) else tensor.unsqueeze(0)


def _count(parts: Sequence[_Arranged], n: int) -> int:
    """The number of positions at which all layers act."""
    allowed = [set(part.lengths) or {1} for part in parts]
    shared = set.intersection(*allowed) if allowed else {1}
    if shared:
        return next((t for part in parts for t in part.lengths if t in shared), 1)
    counts = Counter(t for lengths in allowed for t in lengths)
    most = max(counts, key=lambda t: (counts[t], t))
    differing = [pair for pair in zip(parts, allowed, strict=True) if most not in pair[1]]
    odd = sorted({part.names for part, _ in differing})
    others = sorted({t for _, lengths in differing for t in lengths})
    raise InvalidArgumentError(
        f"no token scores: most layers act at {most} positions per example, but the layers of "
        f"{', '.join(odd[:6])} at {', '.join(map(str, others))}, whose gradient does not belong to "
        f"single tokens; {REMEDY}"
    )


def _forms(part: _Arranged, n: int, count: int) -> dict[str, Form]:
    """What the rule returns if each position is an example of its own."""
    layer, lengths = part.layer, part.lengths
    if lengths.count(count) > 1 and count > 1:
        _refuse(
            layer.names.values(),
            f"are of a layer with an output of shape {list(part.delta.shape)}, in which two "
            "dimensions may count tokens",
        )
    axis = 1 + lengths.index(count) if lengths else 0
    tensors = [*part.inputs, part.delta]
    if any(tuple(x.shape[1 : 1 + len(lengths)]) != lengths for x in tensors):
        _refuse_layer(part)
    *inputs, delta = (_by_position(x, axis, n * count) for x in tensors)
    try:
        found = layer.rule(layer.module, inputs, delta, n * count)
        forms = checked_result(found, layer.module, layer.names, n * count)
    except Exception as error:  # a rule for whole examples alone may fail in any way
        if layer.rule in BY_POSITION:
            raise
        _refuse_layer(part, error)
    if part.use.powers is None:
        return forms
    powers = part.use.powers.repeat_interleave(count)
    return {name: scaled_by_powers(form, powers) for name, form in forms.items()}


def _by_position(tensor: Tensor, axis: int, rows: int) -> Tensor:
    if axis == 0:  # a single position
        return tensor
    return tensor.movedim(axis, 1).reshape(rows, *_without(tensor.shape, axis))


def _without(shape: torch.Size, axis: int) -> list[int]:
    return [length for dim, length in enumerate(shape) if dim not in (0, axis)]


def _refuse_layer(part: _Arranged, error: Exception | None = None) -> None:
    kind = type(part.layer.module).__name__
    try:
        _refuse(part.layer.names.values(), f"(of a {kind}) have no gradient per position")
    except InvalidArgumentError as refusal:
        raise refusal from error


def _compare(part: _Arranged, found: Mapping[str, Form], n: int, count: int) -> None:
    """Compare the sum over the first example's positions with its gradient."""
    is_scaled = bool(getattr(part.layer.module, "scale_grad_by_freq", False))
    if part.layer.rule in BY_POSITION and not is_scaled:
        return
    layout = part.layer.layout
    for name, form in use_forms(part.use, layout, n).items():
        whole = form.rows(slice(0, 1)).dense()
        summed = found[name].rows(slice(0, count)).dense().sum(0, keepdim=True)
        if not torch.allclose(summed, whole, CLOSE, CLOSE * float(whole.abs().max())):
            _refuse_layer(part)
