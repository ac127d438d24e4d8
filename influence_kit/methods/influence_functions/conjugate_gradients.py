"""Influence functions by conjugate gradients: Koh and Liang 2017, arXiv 1703.04730."""

from functools import partial
from typing import Any, Literal

from torch import Tensor

from influence_kit.core.arguments import check_count, check_number
from influence_kit.curvature.passes import DataSet
from influence_kit.errors import InvalidArgumentError
from influence_kit.methods.influence_functions.curvature_influence import CurvatureInfluence
from influence_kit.methods.influence_functions.fitted import Facts
from influence_kit.operators.low_rank import JacobiPreconditioner, NystromPreconditioner
from influence_kit.operators.solvers import Solve, conjugate_gradients
from influence_kit.scoring.term import Transform

# of the Nystroem preconditioner
RANK = 50


class CGInfluenceFunction(CurvatureInfluence):
    r"""score = grad loss(test)^T (C + damping I)^-1 grad loss(train), by conjugate gradients.

    All test examples are solved for at once: one pass over the Hessian data an iteration, whatever
    their number (arXiv 1703.04730). Rows are test examples; positive is a proponent, and leaving
    the training example out raises the test loss by about score / n. The mean over checkpoints:
    about five of one run, evenly over its steps, are recommended (``select_checkpoints``).
    ``self_influence`` and ``relative`` solve for every training example, a batch at a time.

    Args:
        damping, curvature, blocks, hessian_dataset, relative, seed: as in
            ``ExplicitInfluenceFunction``; where C is not written out, "auto" takes its trace
            exactly for blocks of up to 256 parameters, and from 32 random probes for
            larger ones.
        max_iter: the most iterations; a warning tells where they did not suffice.
        tol: an example is done when its residual is this small against its right-hand side.
        preconditioner: None, "jacobi" (the diagonal of C) or "nystrom" (50 eigenpairs of C), which
            saves iterations and costs a pass over the data.

    Raises:
        CurvatureError: where C + damping is not positive definite.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(3, 2).double()
        >>> x, y = torch.randn(8, 3).double(), torch.arange(8) % 2
        >>> train = torch.utils.data.TensorDataset(x, y)
        >>> loss = torch.nn.CrossEntropyLoss()
        >>> cg = CGInfluenceFunction(
        ...     model, train, [model.state_dict()], loss_fn=loss, damping=0.01
        ... )
        >>> cg.influence((x[:4], y[:4]), k=3).indices.shape
        torch.Size([4, 3])
    """

    def __init__(
        self,
        *args: Any,
        max_iter: int = 100,
        tol: float = 1e-6,
        preconditioner: Literal["jacobi", "nystrom"] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if preconditioner not in (None, "jacobi", "nystrom"):
            raise InvalidArgumentError(
                f'`preconditioner` must be None, "jacobi" or "nystrom"; got {preconditioner!r}'
            )
        self.max_iter, self.tol = (
            check_count(max_iter, "max_iter"),
            check_number(tol, "tol", least=0, below=1),
        )
        self.preconditioner = preconditioner

    def _make_inverse(self, facts: Facts, damping: Tensor, data: DataSet) -> Transform:
        operator = self._curvature(data)
        conditioner: Solve | None = None
        if self.preconditioner == "jacobi":
            conditioner = JacobiPreconditioner(operator, damping, self.seed)
        elif self.preconditioner == "nystrom":
            conditioner = NystromPreconditioner(operator, damping, RANK, self.seed)
        solve = partial(
            conjugate_gradients,
            operator,
            damping=damping,
            max_iter=self.max_iter,
            tol=self.tol,
            preconditioner=conditioner,
        )
        return self._through(solve)
