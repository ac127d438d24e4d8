"""The gradient of scores in the training inputs: which features make a training example matter.

Letters: m test and n training examples, v vectors, k features asked for, P chosen parameters, d
dimensions of what is perturbed of one example.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp

from influence_kit.checkpoint_loader import CheckpointLoader
from influence_kit.data import (
    Batch,
    call_arguments,
    call_model,
    example_count,
    map_tensors,
    take,
    to_device,
)
from influence_kit.errors import InvalidArgumentError, NonFiniteError
from influence_kit.gradients.source import GradientSource, kept_bytes
from influence_kit.losses import Loss
from influence_kit.memory import rows_within, workspace_bytes
from influence_kit.operators.partition import Partition
from influence_kit.operators.products import (
    Mode,
    Tree,
    _leaves,
    _pull,
    _vmapped,
    differentiable_attention,
)
from influence_kit.scoring.reducers import TopK

# places in the training set, and their part of the result
Block = tuple[Tensor, Tensor]
# a batch with the place where it begins and the rows of it that are wanted
Rows = tuple[int, Tensor, Batch]


class MostInfluentialFeatures(NamedTuple):
    """The k features of training examples that have the largest effect on each of m test examples.

    Attributes:
        indices: int64 ``[m, k, 1 + d]``: the example's place in the training set, then the place of
            the feature in its input (or in the output of the layer).
        influence_scores: ``[m, k]``, the largest absolute value first, each with its own sign.
    """

    indices: Tensor
    influence_scores: Tensor


def mixed_product(
    function: Callable[[Tree, Tensor], Tensor],
    parameters: Tree,
    shift: Tensor,
    vectors: Tree,
    mode: Mode = "forward",
) -> Tensor:
    """d/ds <v, df/dp> for each vector v, of a scalar function f of parameters p and a shift s.

    Args:
        function: parameters by name and a shift to a scalar.
        parameters: where to take it.
        shift: likewise.
        vectors: ``[v, *shape]`` by name.
        mode: "forward" or "reverse" over reverse.

    Returns:
        ``[v, *shape of the shift]``.
    """
    with differentiable_attention():
        if mode == "reverse":
            leaves, point = _leaves(parameters), shift.detach().requires_grad_()
            with torch.enable_grad():
                value = function(leaves, point)
                slopes = _pull([value], list(leaves.values()), [torch.ones_like(value)], keep=True)
            rows = zip(*vectors.values(), strict=True)
            return torch.stack([_pull(slopes, [point], row, keep=False)[0] for row in rows])

        def slope(values: Tree) -> Any:
            return grad(function, argnums=1)(values, shift)

        return _vmapped(lambda v: {"": jvp(slope, (parameters,), (v,))[1]}, vectors)[""]


@dataclass
class Perturbed:
    """What of a model is perturbed: its only floating-point input, or the output of a layer."""

    model: nn.Module
    layer: str | None

    def changed(self, change: Callable[[Any], Any]) -> AbstractContextManager[Any]:
        """Inside, the model works with the changed value."""

        def change_inputs(_: nn.Module, args: Any, kwargs: Any) -> Any:
            # what a model takes as labels is its target
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
        """The value that the model works with."""
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
            f"what is to be perturbed has shape {list(value.shape)} for {n} examples and "
            f"{list(one.shape)} for one: no dimension counts the examples. Choose another `layer`"
        )


@dataclass
class Perturbation:
    """d/dx <v, gradient of an example's loss in the parameters>, summed over checkpoints.

    Args:
        source: the model and its chosen parameters.
        loss: the loss of training examples.
        perturbed: what x is.
        loader: puts checkpoints into the model.
        vectors: ``[m, P]`` of each checkpoint.
    """

    source: GradientSource
    loss: Loss
    perturbed: Perturbed
    loader: CheckpointLoader
    vectors: Sequence[Tensor]
    mode: Mode = "forward"

    def blocks(self, chosen: Iterable[Rows]) -> Iterator[Block]:
        """Places in the training set with their part of the result, ``[m, n, *shape]``."""
        for start, rows, batch in chosen:
            batch = to_device(batch, self.vectors[0].device)
            self.loader.load(0)
            self.source.prepare(batch, self.loss)
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
        """How many rows and how many vectors to take at once."""
        (m, size), element = self.vectors[0].shape, self.vectors[0].element_size()
        workspace = workspace_bytes(value.device)
        # the activations of an example are held once a vector
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
        args, kwargs = call_arguments(model, batch)

        def function(values: Tree, shift: Tensor) -> Tensor:
            with self.perturbed.changed(lambda value: value + shift):
                outputs = functional_call(model, dict(values), args, kwargs)
            return self.loss.total(outputs, batch, n)

        values = {name: p.detach() for name, p in self.source.capture.parameters.items()}
        shapes = {name: value.shape for name, value in values.items()}
        trees = Partition({"all": list(shapes)}, shapes).split(vectors)
        along = {name: tree.to(values[name].dtype) for name, tree in trees.items()}
        return self._in_either_mode(partial(mixed_product, function, values, zeros, along))

    def _in_either_mode(self, product: Callable[[Mode], Tensor]) -> Tensor:
        if self.mode == "forward":
            try:
                return product("forward")
            except RuntimeError as error:
                self.mode = "reverse"
                found = product("reverse")
                warnings.warn(
                    "the model has an operation without forward-mode derivative or batching rule "
                    f"({str(error).splitlines()[0]}): perturbations are computed by two reverse "
                    "passes, which is exact and slower",
                    stacklevel=2,
                )
                return found
        return product("reverse")


def _refuse_half(dtype: torch.dtype) -> None:
    if torch.finfo(dtype).bits < 32:
        raise InvalidArgumentError(
            f"second derivatives of a model in {dtype} are mostly rounding: use `model.float()`"
        )


def _refuse_non_finite(block: Tensor, places: Tensor) -> None:
    bad = (~torch.isfinite(block)).nonzero()
    if len(bad):
        row, column = bad[0, :2].tolist()
        raise NonFiniteError(
            f"the perturbation influence of training example {places[column]} on test example "
            f"{row} is NaN or infinite; the second derivatives of the loss there are not finite"
        )


def check_places(train_indices: Any, count: int) -> Tensor | None:
    """Places in a training set of ``count`` examples (0 where unknown), ``[n]``; None for all."""
    if train_indices is None:
        return None
    try:
        places = torch.as_tensor(train_indices).cpu()
    except (TypeError, ValueError, RuntimeError):
        places = torch.zeros(0)
    if places.dtype not in (torch.int64, torch.int32) or places.dim() != 1 or not len(places):
        raise InvalidArgumentError(
            "`train_indices` must be a list of places in the training set, one int or more; got "
            f"{train_indices!r}"
        )
    if places.min() < 0 or (count and places.max() >= count):
        _refuse_places(places, count)
    return places.long()


def _refuse_places(places: Tensor, count: int) -> None:
    size = f", which has {count} examples" if count else ""
    raise InvalidArgumentError(
        f"`train_indices` holds places from {places.min()} to {places.max()}; they must be 0 or "
        f"more and within the training set{size}"
    )


def chosen_rows(
    batches: Iterable[Batch], places: Tensor | None, tick: Callable[[], object]
) -> Iterator[Rows]:
    """The batches that hold the places, read no further than needed; all where None."""
    start = 0
    for batch in batches:
        n = example_count(batch)
        rows = torch.arange(n)
        if places is not None:
            rows = rows[torch.isin(rows + start, places)]
        if len(rows):
            yield start, rows, batch
        start += n
        tick()
        if places is not None and start > places.max():
            return
    if places is not None:
        _refuse_places(places, start)


def joined(blocks: Iterable[Block], wanted: Tensor | None) -> Tensor:
    """The whole result ``[m, n, *shape]``, in the order of the places that were asked for."""
    parts: list[Tensor] = []
    for places, block in blocks:
        if parts and block.shape[2:] != parts[0].shape[2:]:
            raise InvalidArgumentError(
                f"what is perturbed has shape {list(block.shape[2:])} for training example "
                f"{places[0]} and {list(parts[0].shape[2:])} for those before it: one tensor "
                "cannot hold both. Ask for `k`, or by `train_indices` for examples of one shape"
            )
        parts.append(block)
    whole = torch.cat(parts, dim=1)
    if wanted is None:
        return whole
    return whole[:, torch.unique(wanted, return_inverse=True)[1]]


def most_influential(blocks: Iterable[Block], k: int) -> MostInfluentialFeatures:
    """The k entries with the largest absolute values, in memory for ``m * k`` and a block."""
    best: list[MostInfluentialFeatures] = []
    for places, block in blocks:
        scores = block.flatten(1)
        columns = _largest(scores, k)
        indices = torch.stack(torch.unravel_index(columns, block.shape[1:]), dim=-1)
        indices[..., 0] = places.to(block.device)[indices[..., 0]]
        best.append(MostInfluentialFeatures(indices, scores.gather(1, columns)))
        indices, scores = (torch.cat(both, dim=1) for both in zip(*best, strict=True))
        order = _largest(scores, k)
        indices = indices.take_along_dim(order[..., None], dim=1)
        best = [MostInfluentialFeatures(indices, scores.gather(1, order))]
    return best[0]


def _largest(scores: Tensor, k: int) -> Tensor:
    """The columns of the k largest absolute values of each row; of equal ones the first."""
    top = TopK(k, proponents=True)
    top.update(torch.arange(scores.shape[1]), scores.abs())
    return top.local_result().indices
