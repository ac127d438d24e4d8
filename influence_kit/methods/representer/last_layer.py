"""Examples at the last layer of a model: its input, and the loss as a function of its output.

Shapes: n examples, t positions (1 unless an example is a sequence), d features, c outputs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from influence_kit.data.axis_search import LABEL_KEYS
from influence_kit.data.batches import (
    Batch,
    call_arguments,
    call_model,
    example_count,
    map_tensors,
    targets_of,
)
from influence_kit.data.class_labels import check_labels, labels_of, logits_of, with_logits
from influence_kit.errors import InvalidArgumentError
from influence_kit.losses.loss import Loss


@dataclass(frozen=True)
class LastLayer:
    """A batch of examples after the forward pass, at the last layer.

    Args:
        features: the layer's input, float64 ``[n, t, d]``.
        outputs: the model's outputs; the logits are the layer's output, possibly reshaped.
        batch: the other arguments of the loss, in float64.
    """

    features: Tensor
    outputs: Any
    batch: Batch

    @property
    def width(self) -> int:
        """The number c of outputs."""
        return logits_of(self.outputs).numel() // self.features[..., 0].numel()

    def total(self, loss: Loss, logits: Tensor) -> Tensor:
        """The sum of the examples' losses if the layer's outputs are ``logits`` ``[n, t, c]``."""
        known = logits_of(self.outputs)
        shown = with_logits(self.outputs, logits.reshape(known.shape))
        try:
            return loss.total(shown, self.batch, len(self.features))
        except RuntimeError as error:
            if known.dtype == logits.dtype:
                raise
            raise InvalidArgumentError(
                f"`{loss.name}` takes outputs of {known.dtype} and not of {logits.dtype}, in which "
                f"the last layer is refitted ({error}); convert its tensors: weight.to(outputs)"
            ) from error

    def slopes(self, loss: Loss, logits: Tensor) -> Tensor:
        """The gradient of each example's loss in ``logits``, ``[n, t, c]``."""
        logits = logits.detach().requires_grad_()
        with torch.enable_grad():
            return slopes_of(self.total(loss, logits), logits)


def slopes_of(total: Tensor, outputs: Tensor, differentiable: bool = False) -> Tensor:
    """The gradient of a sum of losses in the outputs; zero if it does not depend on them."""
    if not total.requires_grad:
        return torch.zeros_like(outputs)
    return torch.autograd.grad(total, outputs, create_graph=differentiable, materialize_grads=True)[
        0
    ]


def at_last_layer(model: nn.Module, layer: str, batch: Batch, loss: Loss) -> LastLayer:
    """A batch at the layer whose output is the model's output.

    Raises:
        InvalidArgumentError: if the model's output is not the output of that layer.
    """
    calls: list[tuple[Tensor, Tensor]] = []

    def record(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        found = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        # copies: later operations may change either in place
        calls.append((found.detach().to(torch.float64, copy=True), output.detach().clone()))

    handle = model.get_submodule(layer).register_forward_hook(record, with_kwargs=True)
    try:
        with torch.no_grad():
            outputs = call_model(model, batch)
    finally:
        handle.remove()
    logits, n = logits_of(outputs), example_count(batch)
    _check(layer, calls, logits, n)
    features, output = calls[0]
    width = features.shape[-1]
    seen = LastLayer(features.reshape(n, -1, width), outputs, _for_the_loss(batch))
    return _without_inputs(seen, model, loss, output.reshape(*seen.features.shape[:2], -1))


def _check(layer: str, calls: Sequence[tuple[Tensor, Tensor]], logits: Tensor, n: int) -> None:
    if len(calls) != 1:
        raise InvalidArgumentError(
            f"`final_fc_layer` '{layer}' is called {len(calls)} times in a forward pass; the "
            "layer that gives the model's output must be called once"
        )
    output = calls[0][1].to(logits.dtype)
    if output.numel() != logits.numel() or not torch.allclose(
        output.flatten(), logits.flatten(), rtol=0, atol=0, equal_nan=True
    ):
        raise InvalidArgumentError(
            f"the model's output, of shape {list(logits.shape)}, is not the output of "
            f"`final_fc_layer` '{layer}', of shape {list(output.shape)}: name the layer that gives "
            "the model's output, and let `loss_fn` do what follows it (a softmax, a choice of "
            "positions); only a reshape may stand between them"
        )
    if logits.dim() == 0 or logits.shape[0] != n:
        raise InvalidArgumentError(
            f"the model returns outputs of shape {list(logits.shape)} for {n} examples; the first "
            "dimension must be the examples"
        )


def _for_the_loss(batch: Batch) -> Batch:
    """The arguments of the loss in float64 (with mixed precisions some losses take the lower)."""

    def precise(tensor: Tensor) -> Tensor:
        return tensor.double() if tensor.is_floating_point() else tensor

    # the targets only: the inputs of a whole data set would fill the memory
    kept: Batch = batch if isinstance(batch, Mapping) else (targets_of(batch),)
    changed: Batch = map_tensors(kept, precise)
    return changed


def _without_inputs(seen: LastLayer, model: nn.Module, loss: Loss, logits: Tensor) -> LastLayer:
    """The same without the dict's entries that only the model uses (images, for example)."""
    if not isinstance(seen.batch, Mapping):
        return seen
    inputs = {
        key
        for key, value in call_arguments(model, seen.batch)[1].items()
        if isinstance(value, Tensor) and value.is_floating_point() and key not in LABEL_KEYS
    }
    less = {key: value for key, value in seen.batch.items() if key not in inputs}
    lean = replace(seen, batch=less)
    with torch.no_grad():
        expected = seen.total(loss, logits.double())
        try:
            same = bool(lean.total(loss, logits.double()) == expected)
        except Exception:  # any error of a loss without an entry that it uses
            same = False
    return lean if same else seen


def joined(parts: Sequence[LastLayer]) -> list[LastLayer]:
    """All examples in one part if outputs and targets are plain tensors; else the parts."""
    outputs = [part.outputs for part in parts]
    targets = [targets_of(part.batch) for part in parts]
    if not all(isinstance(item, Tensor) for item in (*outputs, *targets)):
        return list(parts)
    if len({(o.shape[1:], y.shape[1:]) for o, y in zip(outputs, targets, strict=True)}) > 1:
        return list(parts)
    features = torch.cat([part.features for part in parts])
    return [LastLayer(features, torch.cat(outputs), (torch.cat(targets),))]


def chosen_outputs(values: Tensor, batch: Batch, shift: int) -> Tensor:
    """The output that a test example's scores sum to, that of its label, as ``[n, t, c]``.

    Args:
        values: minus the slopes of the examples' losses, up to a factor, ``[n, t, c]``.
        batch: the batch, with labels.
        shift: the number of positions by which labels lag behind outputs.

    Raises:
        InvalidArgumentError: if there are several outputs and not one integer label for each.
    """
    n, t, c = values.shape
    if c == 1:
        return values.sign()
    labels = labels_of(batch)
    if labels.is_floating_point() or labels.numel() != n * t:
        raise InvalidArgumentError(
            f"with {c} outputs the score is of the label's output, so that labels must be integers "
            f"of shape {[n] if t == 1 else [n, t]}; got {labels.dtype} of shape "
            f"{list(labels.shape)}"
        )
    labels = F.pad(labels.reshape(n, t)[:, shift:].long(), (0, shift), value=-1)
    matters = values.ne(0).any(2)  # otherwise the loss ignores it by an ignored label of any number
    counts = (labels >= 0) & (matters if t > 1 else matters | (labels < c))
    labels = labels.where(counts, 0)
    check_labels(labels, c)
    chosen = torch.zeros_like(values).scatter_(2, labels.unsqueeze(2), 1.0)
    return chosen * counts.unsqueeze(2)
