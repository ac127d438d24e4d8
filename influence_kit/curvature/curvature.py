"""Curvature of the mean loss over a data set, as an operator that multiplies vectors.

C = 1/n sum_j C_j, C_j of example j: its loss's Hessian, its Gauss-Newton matrix J^T H J, or the
outer product of its gradient. Sums run over examples, so that results depend neither on the
batch size nor on a short last batch.

Shapes: n examples, k vectors, P elements of all blocks, B blocks.
"""

from abc import abstractmethod
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from influence_kit.core.dtypes import real, restored
from influence_kit.core.memory import rows_within, workspace_bytes
from influence_kit.curvature.passes import DataSet, refuse_non_finite
from influence_kit.data.batches import (
    Batch,
    call_arguments,
    example_count,
    map_outputs,
    split,
)
from influence_kit.errors import InvalidArgumentError
from influence_kit.gradients.batch_memory import kept_bytes
from influence_kit.gradients.gradient_source import GradientSource
from influence_kit.losses.loss import Loss
from influence_kit.operators.block import Block
from influence_kit.operators.operator import Operator
from influence_kit.operators.partition import Partition
from influence_kit.operators.products import (
    EitherMode,
    Mode,
    Tree,
    gauss_newton_product,
    hessian_product,
)


class Curvature(Operator):
    """The mean over a data set of the examples' curvatures, block-diagonal.

    Args:
        data: the data set.
        partition: the parameters, in blocks.
        sample: a tensor with the dtype and device of vectors.
    """

    def __init__(self, data: DataSet, partition: Partition, sample: Tensor) -> None:
        super().__init__(partition.sizes, sample)
        self.data = data
        self.partition = partition

    @abstractmethod
    def batch_product(self, indices: Tensor, batch: Batch, vectors: Tensor) -> Tensor:
        """The sum over a batch's examples of C_j times each vector, ``[k, P]``."""

    def product(self, vectors: Tensor) -> Tensor:
        total = torch.zeros_like(vectors)
        for indices, batch in self.data:
            total += self.batch_product(indices, batch, vectors)
        return refuse_non_finite(total) / self.data.count

    @property
    def core_sizes(self) -> list[int]:
        """The number of rows of the matrix that ``blocks`` holds for each block."""
        return self.sizes

    def blocks(self) -> list[Block]:
        """The blocks, to be inverted."""
        return [Block(block) for block in self.dense()]


class LossCurvature(Curvature):
    """Curvature by differentiating the batch's loss as a function of the parameters.

    Args:
        source: the gradients of the model, with the checkpoint loaded; it checks the loss.
        loss: the loss.
        data, partition, sample: as in ``Curvature``.

    Raises:
        InvalidArgumentError: for a model in half precision, whose second derivatives are noise.
    """

    def __init__(
        self,
        source: GradientSource,
        loss: Loss,
        data: DataSet,
        partition: Partition,
        sample: Tensor,
    ) -> None:
        super().__init__(data, partition, sample)
        self.source = source
        self.model = source.capture.model
        self.loss = loss
        dtype = next(iter(source.capture.parameters.values())).dtype
        if torch.finfo(dtype).bits < 32:
            raise InvalidArgumentError(
                f"second derivatives of a model in {dtype} are mostly rounding: use "
                "`model.float()`, or a curvature of gradients, which are added up in float32 "
                '("empirical_fisher", "fisher"; `EKFACInfluenceFunction`)'
            )
        self.either_mode = EitherMode("curvature is")
        self._kept = 0

    @abstractmethod
    def block_product(
        self, batch: Batch, parameters: Tree, vectors: Tree, mode: Mode
    ) -> dict[str, Tensor]:
        """The sum over a batch of C_j restricted to the named parameters, times each vector."""

    def batch_product(self, indices: Tensor, batch: Batch, vectors: Tensor) -> Tensor:
        self.source.prepare(batch, self.loss, int(indices[0]))
        # activations of every example are held once per vector, and numbers of each vector
        self._kept = self._kept or kept_bytes(self.model, batch)
        budget = 8 * workspace_bytes(self.sample.device)
        own = 2 * self.size * self.sample.element_size()
        at_once = rows_within(budget, self._kept + own)
        parts = []
        for some in vectors.split(at_once):
            rows = rows_within(budget, self._kept * len(some))
            pieces = [self._piece_product(piece, some) for piece in split(batch, rows)]
            parts.append(sum(pieces[1:], pieces[0]))
        return torch.cat(parts)

    def _piece_product(self, batch: Batch, vectors: Tensor) -> Tensor:
        found: dict[str, Tensor] = {}
        trees = self.partition.split(vectors)
        for names in self.partition.blocks.values():
            parameters = {name: real(self.model.get_parameter(name).detach()) for name in names}
            block = {name: trees[name].to(parameters[name].dtype) for name in names}
            found.update(self.either_mode(partial(self.block_product, batch, parameters, block)))
        columns = [_dense(found[name]).reshape(len(vectors), -1) for name in self.partition.names]
        return torch.cat(columns, dim=1).to(vectors)

    def _outputs(self, batch: Batch, values: Tree) -> Any:
        args, kwargs = call_arguments(self.model, batch)
        own = {n: restored(v, self.model.get_parameter(n)) for n, v in values.items()}
        return functional_call(self.model, own, args, kwargs)


class HessianOfLoss(LossCurvature):
    """C_j: the Hessian of example j's loss. It may be indefinite."""

    def block_product(
        self, batch: Batch, parameters: Tree, vectors: Tree, mode: Mode
    ) -> dict[str, Tensor]:
        n = example_count(batch)

        def total(values: Tree) -> Tensor:
            return self.loss.total(self._outputs(batch, values), batch, n)

        return hessian_product(total, parameters, vectors, mode)


class GaussNewton(LossCurvature):
    """C_j = J^T H J: J of the model's outputs, H the Hessian of the loss in the outputs.

    Positive semi-definite for a loss that is convex in the outputs; the Hessian itself for models
    that are linear in their parameters.
    """

    def block_product(
        self, batch: Batch, parameters: Tree, vectors: Tree, mode: Mode
    ) -> dict[str, Tensor]:
        n = example_count(batch)
        if not self.loss.is_of_outputs:
            raise InvalidArgumentError(
                "curvature='ggn' takes second derivatives of `loss_fn` in the model's outputs; "
                "without a `loss_fn` they are zero here. Pass `loss_fn`, or use another curvature"
            )
        with torch.no_grad():
            shown = self._outputs(batch, parameters)

        def outputs(values: Tree) -> tuple[Tensor, ...]:
            return tuple(_floating(self._outputs(batch, values)))

        def total(values: Any) -> Tensor:
            supply = iter(values)
            rebuilt = map_outputs(
                shown, lambda t: restored(next(supply), t) if _is_number(t) else t
            )
            return self.loss.total(rebuilt, batch, n)

        return gauss_newton_product(outputs, total, parameters, vectors, mode)


def _dense(tensor: Tensor) -> Tensor:
    """The tensor; a sparse one (of ``Embedding(sparse=True)``) is made dense."""
    return tensor.to_dense() if tensor.is_sparse else tensor


def _floating(outputs: Any) -> list[Tensor]:
    """The floating-point tensors of a model's outputs, in their order; complex ones as pairs."""
    found: list[Tensor] = []
    map_outputs(outputs, lambda t: found.append(real(t)) if _is_number(t) else None)
    return found


def _is_number(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
