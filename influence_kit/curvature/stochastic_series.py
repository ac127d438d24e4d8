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
from influence_kit.data.batches import to_device
from influence_kit.errors import InvalidArgumentError
from influence_kit.gradients.per_example import Transform
from influence_kit.operators.solvers import MOST, lissa


class LiSSA(OperatorInverse):
    """A series whose iterations use a few examples each; see ``LiSSAInfluenceFunction``.

    Args:
        damping, curvature, blocks, seed: as in ``OperatorInverse``.
        recursion_depth: the number of iterations.
        num_repeat: the number of series to average, each with its own samples.
        scale: s, or "auto": 1.1 times the largest eigenvalue of C + damping.
        hessian_batch_size: examples sampled in each iteration; None for all of them.
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

    def inverse(self, state: State, damping: Tensor, data: FitData) -> Transform:
        operator = self.operator(data)
        sampled = self.hessian_batch_size is not None and self.hessian_batch_size < data.count

        def solve(vectors: Tensor) -> Tensor:
            return lissa(
                operator,
                vectors,
                damping,
                self.recursion_depth,
                self.num_repeat,
                self.scale,
                self._samples(operator, data) if sampled else None,
                tol=torch.finfo(vectors.dtype).eps,
            )

        return data.through(solve)

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
