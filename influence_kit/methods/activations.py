"""The outputs of layers for a batch, in one forward pass.

Shapes: n examples of a batch, d features of an example.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from influence_kit.core.dtypes import exact
from influence_kit.data.batches import (
    Batch,
    call_arguments,
    example_axis,
    example_count,
    map_tensors,
    take,
    tensor_axes,
)
from influence_kit.data.class_labels import label_key
from influence_kit.errors import InvalidArgumentError
from influence_kit.methods.row_check import RowCheck


def layer_outputs(
    model: nn.Module, layers: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The output of each layer in one call of the model; the last one if a layer runs again."""
    found: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, args: Any, output: Any) -> None:
        # a copy, because later operations may be in place
        found[name] = _one_tensor(name, output).detach().clone()

    handles = []
    try:
        for name in layers:
            handles.append(model.get_submodule(name).register_forward_hook(partial(keep, name)))
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    silent = [name for name in layers if name not in found]
    if silent:
        raise InvalidArgumentError(
            f"the layers {silent} did not run when the model was called; name layers that it uses"
        )
    return found


def _tensors(batch: Batch) -> list[Tensor]:
    found: list[Tensor] = []
    map_tensors(batch, found.append)
    return found


def _one_tensor(layer: str, output: Any) -> Tensor:
    if isinstance(output, tuple | list) and len(output) == 1:
        output = output[0]
    if isinstance(output, Tensor) and output.is_complex():
        raise InvalidArgumentError(
            f"layer '{layer}' returns {output.dtype}, and activations are compared as real "
            "numbers: name another layer"
        )
    if isinstance(output, Tensor):
        return output
    raise InvalidArgumentError(
        f"layer '{layer}' returns a {type(output).__name__}, not one tensor; name a layer inside "
        "it that returns one"
    )


def examples_first(layer: str, output: Tensor, n: int, one: torch.Size) -> Tensor:
    """The output of a layer with its n examples in the first dimension.

    Args:
        layer: its name.
        output: the output for n examples.
        n: the number of examples.
        one: the shape of the output for one example, which shows the dimension of examples.
    """
    for axis, lengths in enumerate(zip(output.shape, one, strict=False)):
        if lengths == (n, 1):
            return output.movedim(axis, 0)
    raise InvalidArgumentError(
        f"layer '{layer}' returns a tensor of shape {list(output.shape)} for {n} examples and "
        f"{list(one)} for one: no dimension counts the examples. Name another layer"
    )


@dataclass
class Features:
    """Features ``[n, d]`` of batches: the output of a layer, or floating-point inputs, flattened.

    Args:
        model: the model.
        layer: the name of a layer; None for the inputs.
    """

    model: nn.Module
    layer: str | None
    _one: torch.Size | None = None
    _width: int | None = None
    _check: RowCheck = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._check = RowCheck(self.model, f"the outputs of layer '{self.layer}'")

    def __call__(self, batch: Batch) -> Tensor:
        """The features of a batch that is on the model's device.

        Raises:
            InvalidArgumentError: if they are not floating-point numbers, or their number differs
                from that of earlier batches.
        """
        found = self._inputs(batch) if self.layer is None else self._outputs(batch)
        found = exact(found.detach())
        if self._width not in (None, found.shape[1]):
            raise InvalidArgumentError(
                f"some examples have {self._width} features, and others {found.shape[1]}: pad the "
                "inputs of all examples to one length, or name a `layer` whose output has one size"
            )
        self._width = found.shape[1]
        return found

    def _outputs(self, batch: Batch) -> Tensor:
        assert self.layer is not None
        if self._one is None:
            self._one = self._run(take(batch, slice(0, 1))).shape
        n = example_count(batch)
        (found,) = self._check(batch, self._rows)
        if not found.is_floating_point():
            raise InvalidArgumentError(
                f"layer '{self.layer}' returns {found.dtype}; features are floating-point numbers: "
                "name another layer"
            )
        return found.reshape(n, -1)

    def _rows(self, batch: Batch) -> list[Tensor]:
        assert self.layer is not None
        assert self._one is not None
        return [examples_first(self.layer, self._run(batch), example_count(batch), self._one)]

    def _run(self, batch: Batch) -> Tensor:
        assert self.layer is not None
        args, kwargs = call_arguments(self.model, batch)
        return layer_outputs(self.model, [self.layer], args, kwargs)[self.layer]

    def _inputs(self, batch: Batch) -> Tensor:
        n = example_count(batch)
        args, kwargs = call_arguments(self.model, batch)
        # the labels that a model takes are its target
        target = label_key(batch) if kwargs else None
        inputs = (args, {name: value for name, value in kwargs.items() if name != target})
        parts: list[Tensor] = []
        map_tensors(inputs, parts.append)
        of_batch = dict(zip(map(id, _tensors(batch)), tensor_axes(batch), strict=True))
        axes = [of_batch.get(id(part), example_axis(part, n)) for part in parts]
        if not parts or None in axes or not all(part.is_floating_point() for part in parts):
            there = map_tensors(inputs, lambda part: (part.dtype, list(part.shape)))
            raise InvalidArgumentError(
                f"the inputs {[some for some in there if some]} of {n} examples are not all "
                "floating-point tensors with one row per example: name a `layer`, whose output is "
                "then compared"
            )
        rows = [part.movedim(axis or 0, 0) for part, axis in zip(parts, axes, strict=True)]
        return torch.cat([part.reshape(n, -1) for part in rows], dim=1)
