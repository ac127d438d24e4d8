"""Influence functions by the randomized Nystroem approximation, arXiv 2110.02820."""

from typing import Any

from torch import Tensor

from influence_kit.core.arguments import check_count
from influence_kit.curvature.passes import DataSet
from influence_kit.methods.influence_functions.curvature_influence import CurvatureInfluence
from influence_kit.methods.influence_functions.fitted import Facts
from influence_kit.operators.low_rank import LowRank, as_tensors, from_tensors, nystrom
from influence_kit.scoring.term import Transform


class NystromInfluenceFunction(CurvatureInfluence):
    r"""score = grad loss(test)^T (C_nys + damping I)^-1 grad loss(train), C_nys of a given rank.

    .. math::
        C_{nys} = (C \Omega)(\Omega^T C \Omega)^{+}(C \Omega)^T, \qquad
        (C_{nys} + \lambda I)^{-1} = U (S + \lambda)^{-1} U^T + (I - U U^T) / \lambda

    One pass over the Hessian data for all random directions together (arXiv 2110.02820); exact
    where the rank of C is at most ``rank``. Wants a curvature that is not negative: "ggn", "fisher"
    or "empirical_fisher", or a Hessian at a minimum. Rows are test examples; positive is a
    proponent, and leaving the training example out raises the test loss by about score / n. The
    mean over checkpoints: about five of one run, evenly over its steps, are recommended
    (``select_checkpoints``).

    Args:
        damping, curvature, blocks, hessian_dataset, relative: as in ``ExplicitInfluenceFunction``;
            the damping must be positive.
        rank: how many directions (of each block: all where it has fewer).
        seed: of the directions.

    Raises:
        CurvatureError: where the curvature is indefinite.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(3, 2)
        >>> x, y = torch.randn(8, 3), torch.arange(8) % 2
        >>> train = torch.utils.data.TensorDataset(x, y)
        >>> loss = torch.nn.CrossEntropyLoss()
        >>> low = NystromInfluenceFunction(
        ...     model, train, [model.state_dict()], loss_fn=loss, rank=4
        ... )
        >>> low.influence((x[:4], y[:4])).shape
        torch.Size([4, 8])
    """

    def __init__(self, *args: Any, rank: int = 100, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rank = check_count(rank, "rank")

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "rank": self.rank}

    def _measure(self, data: DataSet) -> Facts:
        return as_tensors(nystrom(self._curvature(data), self.rank, self.seed))

    def _make_inverse(self, facts: Facts, damping: Tensor, data: DataSet) -> Transform:
        pairs = from_tensors(facts, len(self.block_names))
        return self._through(LowRank(pairs, damping, complement=True))
