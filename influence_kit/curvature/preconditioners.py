"""What speeds up an iterative solver: an approximate inverse, chosen by name or given.

Shapes: k vectors of P entries, B blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from influence_kit.core.arguments import shown
from influence_kit.core.objects import is_one_of
from influence_kit.curvature.curvature import Curvature
from influence_kit.curvature.fit_data import FitData
from influence_kit.curvature.inverse_curvature import InverseCurvature, State
from influence_kit.curvature.kronecker_curvature import EKFAC, KFAC
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
from influence_kit.operators.solvers import Solve

PreconditionerName = Literal["auto", "sample", "jacobi", "nystrom", "kfac", "ekfac"]
PreconditionerArgument = PreconditionerName | InverseCurvature | None
NAMES = ("auto", "sample", "jacobi", "nystrom", "kfac", "ekfac")
# the rank of the Nystroem preconditioner
RANK = 50
# below this condition number a solver takes at most 5/2 log(2 / tol) iterations without a
# preconditioner, which cost less than the fewer ones with it
WELL_CONDITIONED = 25.0
# what is fitted for the preconditioner, in the state of a fit
PREFIX = "preconditioner."

# makes the preconditioner of vectors with the layout of some gradients
ForGradients = Callable[[Gradients], Solve]


class Preconditioner:
    """The choice of a preconditioner, and its fit.

    Args:
        chosen: None, "sample" (gradients of up to 2,048 examples), "jacobi" (the diagonal of C),
            "nystrom" (50 eigenpairs of C), "kfac", "ekfac", or an inverse curvature, which is
            fitted to the same data and has the same damping. "auto" is "sample"; it is None if the
            damping is 0, or so large (above 1/24 of the largest eigenvalue of the sample) that few
            iterations are needed without one.
        seed: the seed of what is sampled.

    Raises:
        InvalidArgumentError: for anything else.
    """

    def __init__(self, chosen: PreconditionerArgument, seed: int) -> None:
        is_given = isinstance(chosen, InverseCurvature)
        if not (is_given or is_one_of(chosen, (None, *NAMES))):
            raise InvalidArgumentError(
                '`preconditioner` must be None, "auto", "sample", "jacobi", "nystrom", "kfac", '
                f'"ekfac" or an inverse curvature such as EKFAC(); got {shown(chosen)}'
            )
        self.chosen, self.seed = chosen, seed
        self._fitted: InverseCurvature | None = None
        if isinstance(chosen, InverseCurvature):
            self._fitted = chosen
        elif chosen in ("kfac", "ekfac"):
            # a solver needs a symmetric map, so no approximate products
            kind = KFAC if chosen == "kfac" else EKFAC
            self._fitted = kind(seed=seed, rtol=0.0)

    @property
    def settings(self) -> dict[str, Any]:
        """What is saved with a fit: nothing, if nothing is fitted."""
        if self._fitted is None:
            return {}
        return {"preconditioner": {"class": type(self._fitted).__name__, **self._fitted.settings}}

    @property
    def sample_size(self) -> int:
        """How many examples have to be sampled; up to twice as many are."""
        return MOST_GRADIENTS // 2 if self.chosen in ("auto", "sample") else 1

    def fit(self, data: FitData) -> State:
        """What is computed once per checkpoint."""
        if self._fitted is None:
            return {}
        state = self._fitted.fit(self._data_of(data))
        return {PREFIX + name: value for name, value in state.items()}

    def solves(
        self, state: State, damping: Tensor, data: FitData, operator: Curvature, at_data: bool
    ) -> ForGradients | None:
        """Makes the preconditioner at a damping; None for none.

        Args:
            state: the state of the fit.
            damping: of each block ``[B]``.
            data: the data of the fit.
            operator: C.
            at_data: whether C is made of gradients at the labels of the data.
        """
        is_damped = bool((damping > 0).all())
        if self.chosen == "sample" or (self.chosen == "auto" and is_damped):
            solve = SamplePreconditioner(
                sample_gradients(data, self.seed, at_data),
                data.partition,
                damping_by_block(damping, len(data.partition.blocks), positive=True),
            )
            if self.chosen == "auto" and solve.condition() < WELL_CONDITIONED:
                return None
            return _same_for_all(solve)
        if self.chosen == "jacobi":
            return _same_for_all(JacobiPreconditioner(operator, damping, self.seed))
        if self.chosen == "nystrom":
            return _same_for_all(NystromPreconditioner(operator, damping, RANK, self.seed))
        if self._fitted is None:
            return None
        own = {
            name.removeprefix(PREFIX): value
            for name, value in state.items()
            if name.startswith(PREFIX)
        }
        inner = self._data_of(data)
        by_block = damping_in(inner.partition, damping, data.partition)
        return Fitted(self._fitted.inverse(own, by_block, inner), data.partition, damping)

    def _data_of(self, data: FitData) -> FitData:
        """The same data for what is fitted, which has blocks of its own."""
        assert self._fitted is not None
        blocks = self._fitted.blocks_of(data.model, data.partition.names)
        return replace(data, partition=Partition(blocks, data.partition.shapes))


def _same_for_all(solve: Solve) -> ForGradients:
    return lambda _: solve


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
