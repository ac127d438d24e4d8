"""The inverse curvature by conjugate gradients, with any other inverse as a preconditioner.

Shapes: m right-hand sides, B blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from influence_kit.core.arguments import check_count, check_number, shown
from influence_kit.core.objects import is_one_of
from influence_kit.curvature.curvature import Curvature
from influence_kit.curvature.damping import DampingArgument
from influence_kit.curvature.fit_data import FitData
from influence_kit.curvature.inverse_curvature import InverseCurvature, State
from influence_kit.curvature.kronecker_curvature import EKFAC, KFAC
from influence_kit.curvature.operator_inverses import (
    BlockArgument,
    CurvatureName,
    OperatorInverse,
)
from influence_kit.curvature.sample_preconditioner import (
    MOST_GRADIENTS,
    SamplePreconditioner,
    sample_gradients,
)
from influence_kit.errors import InvalidArgumentError
from influence_kit.gradients.per_example import Gradients, Transform
from influence_kit.operators.damping_by_block import damping_by_block
from influence_kit.operators.low_rank import JacobiPreconditioner, NystromPreconditioner
from influence_kit.operators.partition import Partition, spread
from influence_kit.operators.solvers import Solve, conjugate_gradients

PreconditionerName = Literal["auto", "sample", "jacobi", "nystrom", "kfac", "ekfac"]
Preconditioner = PreconditionerName | InverseCurvature | None
NAMES = ("auto", "sample", "jacobi", "nystrom", "kfac", "ekfac")
# the rank of the Nystroem preconditioner
RANK = 50
# what is fitted for the preconditioner, in the state of a fit
PREFIX = "preconditioner."


class ConjugateGradients(OperatorInverse):
    """Solves for all vectors together, one pass per iteration; see ``CGInfluenceFunction``.

    Args:
        damping, curvature, blocks, seed: as in ``OperatorInverse``.
        max_iter: the largest number of iterations.
        tol: a vector is done when the norm of its residual, relative to that of its right-hand
            side, is at most this.
        preconditioner: None, "sample" (gradients of up to 2,048 examples), "jacobi" (the diagonal
            of C), "nystrom" (50 eigenpairs of C), "kfac", "ekfac", or an inverse curvature, which
            is fitted to the same data and has the same damping. "auto" is "sample", and None if the
            damping is 0.
    """

    def __init__(
        self,
        damping: DampingArgument = "auto",
        curvature: CurvatureName = "ggn",
        blocks: BlockArgument = "full",
        seed: int = 0,
        max_iter: int = 100,
        tol: float = 1e-6,
        preconditioner: Preconditioner = "auto",
    ) -> None:
        super().__init__(damping, curvature, blocks, seed)
        is_given = isinstance(preconditioner, InverseCurvature)
        if not (is_given or is_one_of(preconditioner, (None, *NAMES))):
            raise InvalidArgumentError(
                '`preconditioner` must be None, "auto", "sample", "jacobi", "nystrom", "kfac", '
                f'"ekfac" or an inverse curvature such as EKFAC(); got {shown(preconditioner)}'
            )
        self.max_iter = check_count(max_iter, "max_iter")
        self.tol = check_number(tol, "tol", least=0, below=1)
        self.preconditioner = preconditioner
        self._fitted: InverseCurvature | None = None
        if isinstance(preconditioner, InverseCurvature):
            self._fitted = preconditioner
        elif preconditioner in ("kfac", "ekfac"):
            # a solver needs a symmetric map, so no approximate products
            kind = KFAC if preconditioner == "kfac" else EKFAC
            self._fitted = kind(seed=seed, rtol=0.0)

    @property
    def settings(self) -> dict[str, Any]:
        if self._fitted is None:
            return super().settings
        own = {"class": type(self._fitted).__name__, **self._fitted.settings}
        return {**super().settings, "preconditioner": own}

    def sample_size(self, partition: Partition) -> int:
        # up to twice as many are sampled
        return MOST_GRADIENTS // 2 if self.preconditioner in ("auto", "sample") else 1

    def fit(self, data: FitData) -> State:
        if self._fitted is None:
            return {}
        state = self._fitted.fit(self._data_of(data))
        return {PREFIX + name: value for name, value in state.items()}

    def inverse(self, state: State, damping: Tensor, data: FitData) -> Transform:
        operator = self.operator(data)
        found = Solved(operator, damping, data.partition, self.max_iter, self.tol)
        is_damped = bool((damping > 0).all())
        if self.preconditioner == "sample" or (self.preconditioner == "auto" and is_damped):
            sample = sample_gradients(data, self.seed, self.curvature == "empirical_fisher")
            made = SamplePreconditioner(
                sample,
                data.partition,
                damping_by_block(damping, len(data.partition.blocks), positive=True),
            )
            found.preconditioner = lambda _: made
        elif self.preconditioner == "jacobi":
            jacobi = JacobiPreconditioner(operator, damping, self.seed)
            found.preconditioner = lambda _: jacobi
        elif self.preconditioner == "nystrom":
            nystrom = NystromPreconditioner(operator, damping, RANK, self.seed)
            found.preconditioner = lambda _: nystrom
        elif self._fitted is not None:
            own = {
                name.removeprefix(PREFIX): value
                for name, value in state.items()
                if name.startswith(PREFIX)
            }
            inner = self._data_of(data)
            by_block = damping_in(inner.partition, damping, data.partition)
            transform = self._fitted.inverse(own, by_block, inner)
            found.preconditioner = Fitted(transform, data.partition, damping)
        return found

    def _data_of(self, data: FitData) -> FitData:
        """The same data for the preconditioner, which has blocks of its own."""
        assert self._fitted is not None
        blocks = self._fitted.blocks_of(data.model, data.partition.names)
        return replace(data, partition=Partition(blocks, data.partition.shapes))


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
    preconditioner: Callable[[Gradients], Solve] | None = None
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


@dataclass(frozen=True)
class Fitted:
    """A fitted inverse curvature as a map of vectors.

    Args:
        transform: the map of gradients.
        partition: the parameters in the order of vectors.
        damping: of each block of the partition; parameters that the map leaves out are divided by
            it.
    """

    transform: Transform
    partition: Partition
    damping: Tensor

    def __call__(self, like: Gradients) -> Solve:
        """The map of vectors of the parameters of some gradients."""

        def solve(vectors: Tensor) -> Tensor:
            found = self.transform(self.partition.gradients(vectors, like))
            columns: dict[str, Tensor] = {}
            for name, form in found.forms.items():
                columns.update(form.by_parameter(name))
            lifted = vectors / spread(self.damping, self.partition.sizes).to(vectors)
            for name, own in self.partition.columns(lifted).items():
                columns.setdefault(name, own)
            return torch.cat([columns[name] for name in self.partition.names], dim=1)

        return solve


def damping_in(blocks: Partition, damping: Tensor, of: Partition) -> Tensor:
    """The damping of other blocks: that of the block with their first parameter."""
    values = damping.tolist()
    known = {name: values[i] for i, names in enumerate(of.blocks.values()) for name in names}
    found = [known[names[0]] for names in blocks.blocks.values()]
    return torch.tensor(found, dtype=torch.float64, device=damping.device)
