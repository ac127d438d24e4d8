"""The inverse curvature by conjugate gradients, with any other inverse as a preconditioner.

Shapes: m right-hand sides, B blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from influence_kit.core.arguments import check_count, check_number
from influence_kit.curvature.curvature import Curvature
from influence_kit.curvature.damping import DampingArgument
from influence_kit.curvature.fit_data import FitData
from influence_kit.curvature.inverse_curvature import State
from influence_kit.curvature.operator_inverses import (
    BlockArgument,
    CurvatureName,
    OperatorInverse,
)
from influence_kit.curvature.preconditioners import (
    ForGradients,
    Preconditioner,
    PreconditionerArgument,
)
from influence_kit.gradients.per_example import Gradients, Transform
from influence_kit.operators.partition import Partition
from influence_kit.operators.solvers import conjugate_gradients


class ConjugateGradients(OperatorInverse):
    """Solves for all vectors together, one pass per iteration; see ``CGInfluenceFunction``.

    Args:
        damping, curvature, blocks, seed: as in ``OperatorInverse``.
        max_iter: the largest number of iterations.
        tol: a vector is done when the norm of its residual, relative to that of its right-hand
            side, is at most this.
        preconditioner: as ``Preconditioner`` takes it.
    """

    def __init__(
        self,
        damping: DampingArgument = "auto",
        curvature: CurvatureName = "ggn",
        blocks: BlockArgument = "full",
        seed: int = 0,
        max_iter: int = 100,
        tol: float = 1e-6,
        preconditioner: PreconditionerArgument = "auto",
    ) -> None:
        super().__init__(damping, curvature, blocks, seed)
        self.max_iter = check_count(max_iter, "max_iter")
        self.tol = check_number(tol, "tol", least=0, below=1)
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
        is_empirical = self.curvature == "empirical_fisher"
        made = self._chosen.solves(state, damping, data, operator, is_empirical)
        return Solved(operator, damping, data.partition, self.max_iter, self.tol, made)


@dataclass
class Solved:
    """The map of gradients by (C + damping)^-1.

    Args:
        operator: C.
        damping: of each block ``[B]``.
        partition: the parameters in blocks.
        max_iter, tol: as in ``conjugate_gradients``.
        preconditioner: makes the preconditioner of vectors like some gradients; None for none.

    Attributes:
        reports: the iterations and relative residuals of each call, both ``[m]``.
    """

    operator: Curvature
    damping: Tensor
    partition: Partition
    max_iter: int
    tol: float
    preconditioner: ForGradients | None = None
    reports: list[tuple[Tensor, Tensor]] = field(default_factory=list, init=False)

    def __call__(self, gradients: Gradients) -> Gradients:
        """The solutions for some gradients."""
        made = None if self.preconditioner is None else self.preconditioner(gradients)
        found = conjugate_gradients(
            self.operator,
            self.partition.flat(gradients),
            self.damping,
            self.max_iter,
            self.tol,
            made,
            lambda *report: self.reports.append(report),
        )
        return self.partition.gradients(found, gradients)
