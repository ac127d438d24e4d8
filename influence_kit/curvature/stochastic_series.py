"""The inverse curvature by a stochastic series: LiSSA, arXiv 1602.03943."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, default_collate

from influence_kit.core.arguments import check_count, check_number
from influence_kit.core.objects import is_one_of
from influence_kit.curvature.curvature import Curvature
from influence_kit.curvature.damping import DampingArgument
from influence_kit.curvature.fit_data import FitData
from influence_kit.curvature.inverse_curvature import State
from influence_kit.curvature.operator_inverses import (
    BlockArgument,
    CurvatureName,
    OperatorInverse,
)
from influence_kit.curvature.preconditioners import Preconditioner, PreconditionerArgument
from influence_kit.data.batches import to_device
from influence_kit.errors import InvalidArgumentError
from influence_kit.gradients.per_example import Gradients, Transform
from influence_kit.operators.partition import Partition
from influence_kit.operators.preconditioned_series import preconditioned_series
from influence_kit.operators.solvers import MOST, lissa


class LiSSA(OperatorInverse):
    """A series whose iterations use a few examples each; see ``LiSSAInfluenceFunction``.

    Args:
        damping, curvature, blocks, seed: as in ``OperatorInverse``.
        recursion_depth: the number of iterations.
        num_repeat: the number of series to average, each with its own samples.
        scale: s, or "auto": 1.1 times the largest eigenvalue of C + damping.
        hessian_batch_size: examples sampled in each iteration; None for all of them.
        preconditioner: as ``Preconditioner`` takes it; "auto" (s) is then 1.1 times the largest
            eigenvalue of M (C_s + damping).
    """

    # each iteration has its own sample, and they are multiplied in order
    is_symmetric = False

    def __init__(
        self,
        damping: DampingArgument = "auto",
        curvature: CurvatureName = "ggn",
        blocks: BlockArgument = "full",
        seed: int = 0,
        recursion_depth: int = 1000,
        num_repeat: int = 1,
        scale: float | Literal["auto"] = "auto",
        hessian_batch_size: int | None = 64,
        preconditioner: PreconditionerArgument = None,
    ) -> None:
        super().__init__(damping, curvature, blocks, seed)
        self.recursion_depth = check_count(recursion_depth, "recursion_depth", most=MOST)
        self.num_repeat = check_count(num_repeat, "num_repeat", most=MOST)
        if hessian_batch_size is not None:
            hessian_batch_size = check_count(hessian_batch_size, "hessian_batch_size")
        self.hessian_batch_size = hessian_batch_size
        if not is_one_of(scale, ("auto",)):
            scale = check_number(scale, "scale", above=0, instead='"auto"')
        self.scale = scale
        self.preconditioner = preconditioner
        self._chosen = Preconditioner(preconditioner, seed)

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, **self._chosen.settings}

    def sample_size(self, partition: Partition) -> int:
        return self._chosen.sample_size

    def fit(self, data: FitData) -> State:
        return self._chosen.fit(data)

    def inverse(self, state: State, damping: Tensor, data: FitData) -> Transform:
        operator = self.operator(data)
        is_sampled = self.hessian_batch_size is not None and self.hessian_batch_size < data.count
        steps = self._samples(operator, data) if is_sampled else None
        is_empirical = self.curvature == "empirical_fisher"
        made = self._chosen.solves(state, damping, data, operator, is_empirical)

        def transform(gradients: Gradients) -> Gradients:
            vectors = data.partition.flat(gradients)
            own = (self.recursion_depth, self.num_repeat, self.scale, steps)
            tol = torch.finfo(vectors.dtype).eps
            if made is None:
                found = lissa(operator, vectors, damping, *own, tol)
            else:
                solve = made(gradients)
                found = preconditioned_series(operator, vectors, damping, solve, *own, tol)
            return data.partition.gradients(found, gradients)

        return transform

    def _samples(
        self, operator: Curvature, data: FitData
    ) -> Callable[[int], Callable[[Tensor], Tensor]]:
        """Products with the curvature of examples that are sampled again in each call."""
        loader: Any = data.loader
        loader.check_draws()
        examples: Any = getattr(loader, "dataset", None)
        batches = getattr(loader, "batch_sampler", None)
        if isinstance(examples, IterableDataset) or batches is None:
            raise InvalidArgumentError(
                f"no examples can be sampled from a {type(loader.batches).__name__} whose data set "
                "does not support indexing; use `hessian_batch_size=None`, which takes all "
                "examples in each iteration"
            )
        collate = getattr(loader, "collate_fn", default_collate)
        order = [index for batch in batches for index in batch]
        count = self.hessian_batch_size or len(order)

        def start(repeat: int) -> Callable[[Tensor], Tensor]:
            generator = torch.Generator().manual_seed(self.seed + repeat)

            def product(vectors: Tensor) -> Tensor:
                indices = torch.randint(len(order), (count,), generator=generator)
                batch = collate([examples[order[index]] for index in indices.tolist()])
                batch = to_device(loader.marked(batch), data.device)
                return operator.batch_product(indices.to(data.device), batch, vectors) / count

            return product

        return start
