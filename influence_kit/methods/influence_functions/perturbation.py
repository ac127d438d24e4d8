"""The gradient of scores in the training inputs: which features determine an example's influence.

Shapes: m test examples, n training examples, v vectors, k requested features, P chosen parameters,
d dimensions of an example's perturbed tensor.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from influence_kit.checkpoints.loader import CheckpointLoader
from influence_kit.core.dtypes import real, restored
from influence_kit.core.memory import rows_within, workspace_bytes
from influence_kit.data.batches import (
    Batch,
    call_arguments,
    call_model,
    example_count,
    map_tensors,
    take,
    to_device,
)
from influence_kit.errors import InvalidArgumentError, NonFiniteError
from influence_kit.gradients.batch_memory import kept_bytes
from influence_kit.gradients.gradient_source import GradientSource
from influence_kit.losses.loss import Loss
from influence_kit.operators.partition import Partition
from influence_kit.operators.products import EitherMode, Tree, mixed_product
from influence_kit.scoring.features import Block, Rows


@dataclass
class Perturbed:
    """The perturbed tensor of a model: its only floating-point input, or the output of a layer."""

    model: nn.Module
    layer: str | None

    def changed(self, change: Callable[[Any], Any]) -> AbstractContextManager[Any]:
        """A context in which the model uses the changed value."""

        def change_inputs(_: nn.Module, args: Any, kwargs: Any) -> Any:
            # the labels that a model takes are its target
            own = {name: value for name, value in kwargs.items() if name != "labels"}
            args, own = map_tensors(
                (args, own), lambda t: change(t) if t.is_floating_point() else t
            )
            return args, {**kwargs, **own}

        if self.layer is None:
            return self.model.register_forward_pre_hook(change_inputs, with_kwargs=True)
        module = self.model.get_submodule(self.layer)
        return module.register_forward_hook(lambda _, args, output: change(output))

    def value(self, batch: Batch) -> Tensor:
        """The value that the model uses."""
        seen: list[Any] = []

        def note(value: Any) -> Any:
            seen.append(value)
            return value

        with self.changed(note), torch.no_grad():
            call_model(self.model, batch)
        if len(seen) == 1 and isinstance(seen[0], Tensor) and seen[0].is_floating_point():
            _refuse_half(seen[0].dtype)
            return seen[0]
        if self.layer is not None:
            raise InvalidArgumentError(
                f"layer '{self.layer}' must run once in the model and return a floating-point "
                f"tensor to be perturbed; it ran {len(seen)} times and returned "
                f"{[map_tensors(value, lambda t: t.dtype) for value in seen]}"
            )
        inputs = [some for some in call_arguments(self.model, batch) if some]
        raise InvalidArgumentError(
            f"one floating-point input is perturbed, and the model takes {len(seen)} among its "
            f'inputs {map_tensors(inputs, lambda t: t.dtype)}. layer="name of the embedding layer" '
            "(or of any other) perturbs the output of that layer instead"
        )

    def axis(self, batch: Batch, value: Tensor) -> int:
        """The dimension of the value that counts the batch's examples."""
        n, one = example_count(batch), self.value(take(batch, slice(0, 1)))
        for axis, lengths in enumerate(zip(value.shape, one.shape, strict=False)):
            if lengths == (n, 1):
                return axis
        raise InvalidArgumentError(
            f"the perturbed tensor has shape {list(value.shape)} for {n} examples and "
            f"{list(one.shape)} for one: no dimension counts the examples. Choose another `layer`"
        )


@dataclass
class Perturbation:
    """d/dx <v, gradient of an example's loss in the parameters>, summed over checkpoints.

    Args:
        source: the model and its chosen parameters.
        loss: the loss of training examples.
        perturbed: the tensor x.
        loader: loads checkpoints into the model.
        vectors: the vectors v at each checkpoint, ``[m, P]``.
    """

    source: GradientSource
    loss: Loss
    perturbed: Perturbed
    loader: CheckpointLoader
    vectors: Sequence[Tensor]
    either_mode: EitherMode = field(default_factory=lambda: EitherMode("perturbations are"))

    def blocks(self, chosen: Iterable[Rows]) -> Iterator[Block]:
        """Places in the training set with their part of the result, ``[m, n, *shape]``."""
        for start, rows, batch in chosen:
            batch = to_device(batch, self.vectors[0].device)
            self.loader.load(0)
            self.source.prepare(batch, self.loss, start)
            value = self.perturbed.value(batch)
            axis = self.perturbed.axis(batch, value)
            rows_at_once, vectors_at_once = self._chunks(batch, value)
            for some in rows.split(rows_at_once):
                zeros = value.new_zeros([*value.shape[:axis], len(some), *value.shape[axis + 1 :]])
                block = self._block(take(batch, some), zeros, vectors_at_once)
                block = block.movedim(axis + 1, 1)
                _refuse_non_finite(block, start + some)
                yield start + some, block

    def _chunks(self, batch: Batch, value: Tensor) -> tuple[int, int]:
        """The number of rows and of vectors per chunk."""
        (m, size), element = self.vectors[0].shape, self.vectors[0].element_size()
        workspace = workspace_bytes(value.device)
        # the activations of an example are held once per vector
        kept = kept_bytes(self.source.capture.model, batch)
        vectors = min(m, rows_within(8 * workspace, kept + size * element))
        result = m * element * value.numel() // example_count(batch)
        rows = min(rows_within(8 * workspace, kept * vectors), rows_within(workspace, result))
        return rows, vectors

    def _block(self, batch: Batch, zeros: Tensor, vectors_at_once: int) -> Tensor:
        """``[m, *shape of the zeros]``."""
        block = self.vectors[0].new_zeros(len(self.vectors[0]), *zeros.shape)
        for checkpoint, vectors in enumerate(self.vectors):
            self.loader.load(checkpoint)
            parts = [self._product(batch, zeros, v) for v in vectors.split(vectors_at_once)]
            block += torch.cat(parts)
        return block

    def _product(self, batch: Batch, zeros: Tensor, vectors: Tensor) -> Tensor:
        model, n = self.perturbed.model, example_count(batch)
        parameters = self.source.capture.parameters
        args, kwargs = call_arguments(model, batch)

        def function(values: Tree, shift: Tensor) -> Tensor:
            with self.perturbed.changed(lambda value: value + shift):
                own = {name: restored(value, parameters[name]) for name, value in values.items()}
                outputs = functional_call(model, own, args, kwargs)
            return self.loss.total(outputs, batch, n)

        values = {name: real(p.detach()) for name, p in parameters.items()}
        shapes = {name: value.shape for name, value in values.items()}
        trees = Partition({"all": list(shapes)}, shapes).split(vectors)
        along = {name: tree.to(values[name].dtype) for name, tree in trees.items()}
        return self.either_mode(partial(mixed_product, function, values, zeros, along))


def refuse_other_scores(method: str, relative: str | None, is_linear: bool) -> None:
    """Refuse scores that are not linear in the gradient of the training loss."""
    if relative is not None:
        raise NotImplementedError(
            f'with relative="{relative}" scores are divided by a norm that depends on the '
            "training input, too; `perturbation_influence` needs relative=None"
        )
    if not is_linear:
        raise NotImplementedError(
            f"the scores of {method} are not linear in the gradient of the training loss, which "
            "`perturbation_influence` differentiates: use an influence function "
            "(`EKFACInfluenceFunction`, `LoGra`)"
        )


def _refuse_half(dtype: torch.dtype) -> None:
    if torch.finfo(dtype).bits < 32:
        raise InvalidArgumentError(
            f"second derivatives of a model in {dtype} are mostly rounding: use `model.float()`"
        )


def _refuse_non_finite(block: Tensor, indices: Tensor) -> None:
    bad = (~torch.isfinite(block)).nonzero()
    if len(bad):
        row, column = bad[0, :2].tolist()
        raise NonFiniteError(
            f"the perturbation influence of training example {indices[column]} on test example "
            f"{row} is NaN or infinite; the second derivatives of the loss there are not finite"
        )
