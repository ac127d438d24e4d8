"""Influence functions by LiSSA: Agarwal et al. 2017, arXiv 1602.03943."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, default_collate

from influence_kit.core.arguments import check_count, check_number
from influence_kit.curvature.curvature import Curvature
from influence_kit.curvature.passes import DataSet
from influence_kit.data.batches import to_device
from influence_kit.errors import InvalidArgumentError
from influence_kit.methods.influence_functions.curvature_influence import CurvatureInfluence
from influence_kit.methods.influence_functions.fitted import Facts
from influence_kit.operators.solvers import lissa
from influence_kit.scoring.term import Transform


class LiSSAInfluenceFunction(CurvatureInfluence):
    r"""score = grad loss(test)^T (C + damping I)^-1 grad loss(train), by a stochastic series.

    .. math::
        h \leftarrow v + h - (C_s h + \lambda h) / s, \qquad (C + \lambda I)^{-1} v \approx h / s

    All test examples together (arXiv 1602.03943). The fixed point is (C + damping I)^-1 v for any
    scale s; it is reached where s is above the largest eigenvalue of C + damping, at the rate
    1 - damping / s an iteration, so that a small damping wants a large depth. Rows are test
    examples; positive is a proponent, and leaving the training example out raises the test loss by
    about score / n. The mean over checkpoints: about five of one run, evenly over its steps, are
    recommended (``select_checkpoints``).

    Args:
        damping, curvature, blocks, hessian_dataset, relative: as in ``ExplicitInfluenceFunction``.
        recursion_depth: the number of iterations.
        num_repeat: how many series to average, each with its own samples.
        scale: s, or "auto": 1.1 times the largest eigenvalue of C + damping by power iteration (20
            passes over the Hessian data).
        hessian_batch_size: examples drawn for each iteration; None for all of them, which makes
            the result exact and each iteration a pass.
        seed: of the samples.

    Raises:
        CurvatureError: where the series diverges.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(3, 2)
        >>> x, y = torch.randn(8, 3), torch.arange(8) % 2
        >>> train = torch.utils.data.TensorDataset(x, y)
        >>> loss = torch.nn.CrossEntropyLoss()
        >>> series = LiSSAInfluenceFunction(
        ...     model, train, [model.state_dict()], loss_fn=loss, damping=0.1, recursion_depth=50
        ... )
        >>> series.influence((x[:4], y[:4])).shape
        torch.Size([4, 8])
    """

    def __init__(
        self,
        *args: Any,
        recursion_depth: int = 1000,
        num_repeat: int = 1,
        scale: float | Literal["auto"] = "auto",
        hessian_batch_size: int | None = 64,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.recursion_depth = check_count(recursion_depth, "recursion_depth")
        self.num_repeat = check_count(num_repeat, "num_repeat")
        if hessian_batch_size is not None:
            hessian_batch_size = check_count(hessian_batch_size, "hessian_batch_size")
        self.hessian_batch_size = hessian_batch_size
        if scale != "auto":
            scale = check_number(scale, "scale", above=0, instead='"auto"')
        self.scale = scale

    def _make_inverse(self, facts: Facts, damping: Tensor, data: DataSet) -> Transform:
        operator = self._curvature(data)
        sampled = self.hessian_batch_size is not None and self.hessian_batch_size < data.count

        def solve(vectors: Tensor) -> Tensor:
            return lissa(
                operator,
                vectors,
                damping,
                self.recursion_depth,
                self.num_repeat,
                self.scale,
                self._samples(operator) if sampled else None,
                tol=torch.finfo(vectors.dtype).eps,
            )

        return self._through(solve)

    def _samples(self, operator: Curvature) -> Callable[[int], Callable[[Tensor], Tensor]]:
        """Products with the curvature of examples drawn anew for each call."""
        loader: Any = self._hessian_loader
        loader.check_draws()
        examples: Any = getattr(loader, "dataset", None)
        batches = getattr(loader, "batch_sampler", None)
        if isinstance(examples, IterableDataset) or batches is None:
            raise InvalidArgumentError(
                f"no examples can be drawn from a {type(loader.batches).__name__} without a data "
                "set that has places; use `hessian_batch_size=None`, which takes all of them each "
                "time"
            )
        collate = getattr(loader, "collate_fn", default_collate)
        order = [index for batch in batches for index in batch]
        count = self.hessian_batch_size or len(order)

        def start(repeat: int) -> Callable[[Tensor], Tensor]:
            generator = torch.Generator().manual_seed(self.seed + repeat)

            def product(vectors: Tensor) -> Tensor:
                places = torch.randint(len(order), (count,), generator=generator)
                batch = collate([examples[order[place]] for place in places.tolist()])
                batch = to_device(loader.marked(batch), self._device)
                return operator.batch_product(places.to(self._device), batch, vectors) / count

            return product

        return start
