"""What K-FAC and EK-FAC share: the damping and the inverse of a fitted curvature."""

from dataclasses import replace
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from influence_kit.core.arguments import check_number
from influence_kit.curvature.alignment import misfit
from influence_kit.curvature.evidence import evidence_damping
from influence_kit.curvature.fitted_pieces import (
    LEFT_OUT,
    FittedPiece,
    fitted_pieces,
    form_of_block,
    is_idle,
    mean_of,
)
from influence_kit.curvature.kronecker_inverse import KroneckerInverse
from influence_kit.curvature.observations import Observations, curvature_factor
from influence_kit.curvature.passes import DataSet
from influence_kit.errors import InvalidArgumentError
from influence_kit.gradients.per_example import Gradients
from influence_kit.methods.influence_functions.damping import EVIDENCE, LEARNING_RATES, MEAN, TRACE
from influence_kit.methods.influence_functions.fitted import Facts
from influence_kit.methods.influence_functions.kronecker_fit import OBSERVATIONS, KroneckerFit
from influence_kit.operators.solvers import damping_by_block
from influence_kit.scoring.term import Transform

# examples whose gradients show how well the factors fit, to twice as many, and multiplications for
# all their products with one another
MOST_SAMPLED, LEAST_SAMPLED, SAMPLED_WORK = 256, 8, 2**31


class KroneckerInfluence(KroneckerFit):
    """An influence function whose curvature is a Kronecker product for each layer.

    Args:
        rtol: relative error that a cheaper form of a layer's products may have, for layers whose
            examples have one position; it is measured, and 0 has all products exact.
        curvature, layers_without_kronecker: see ``KroneckerFit``.
    """

    _rules = (EVIDENCE, MEAN, TRACE, LEARNING_RATES)
    _auto_rule = EVIDENCE

    def __init__(self, *args: Any, rtol: float = 1e-5, **kwargs: Any) -> None:
        self.rtol = check_number(rtol, "rtol", least=0, below=1)
        super().__init__(*args, **kwargs)

    # What a user reads.

    @property
    def block_forms(self) -> dict[str, str]:
        """The form of the curvature of each block, once it is fitted; empty before.

        "Kronecker", "diagonal" ("diagonal (zero)" where no example has a gradient) or "left out";
        "Kronecker, diagonal over its 50,257 outputs" where a side of a weight is longer than 8,192;
        by parameter where those of a block differ: "weight: Kronecker; bias: diagonal". Where
        checkpoints differ, their forms with "or" between.
        """
        found: dict[str, list[str]] = {}
        for _, facts in sorted(self._facts.items()):
            fitted = self._fitted(facts)
            for block, names in self._partition.blocks.items():
                text = form_of_block(names, fitted[block], self._is_swapped(block))
                found.setdefault(block, []).append(text)
        return {block: " or ".join(dict.fromkeys(texts)) for block, texts in found.items()}

    @property
    def damping_used(self) -> list[dict[str, float]]:
        """The damping of each block that takes part, at each checkpoint that is fitted.

        With "auto" the blocks of a checkpoint have the same one.
        """
        forms = self.block_forms
        return [
            {block: value for block, value in values.items() if forms[block] != LEFT_OUT}
            for values in super().damping_used
        ]

    # How it is used.

    def _fitted(self, facts: Facts) -> dict[str, list[FittedPiece]]:
        """What was measured, by block; a block that is left out has no pieces."""
        return fitted_pieces(facts, self._partition.blocks, self._shapes)

    def _eigenvalues(self, facts: Facts) -> dict[str, list[Tensor]]:
        """All eigenvalues of each block, diagonals included; none of blocks that are left out."""
        return {
            block: [piece.grid for piece in pieces]
            for block, pieces in self._fitted(facts).items()
            if pieces
        }

    def _traces(self, facts: Facts, data: DataSet) -> Tensor:
        values = self._eigenvalues(facts)
        means = {block: mean_of(own) for block, own in values.items()}
        # no training example has a gradient there: any damping serves
        idle = {block for block in self.block_names if block not in means}
        if self._hessian_data is None:
            idle |= {b for b, own in values.items() if all(is_idle(grid) for grid in own)}
        others = [mean for block, mean in means.items() if block not in idle]
        if others:
            means |= dict.fromkeys(idle, torch.stack(others).mean())
        means_of_blocks = torch.stack([means[block] for block in self.block_names])
        return means_of_blocks * means_of_blocks.new_tensor(self._partition.sizes)

    def _damping_by(self, rule: str, facts: Facts, data: DataSet) -> Tensor:
        if rule not in (EVIDENCE, LEARNING_RATES):
            return super()._damping_by(rule, facts, data)
        self._refuse_old(facts)
        pieces = [piece for own in self._fitted(facts).values() for piece in own]
        if rule == EVIDENCE:
            found = self._evidence(pieces, facts, data)
        else:
            # of the mean loss's curvature, which these eigenvalues are not in the units of
            found = float(super()._damping_by(rule, facts, data)[0])
            found /= curvature_factor(facts[OBSERVATIONS], self.curvature != "fisher")
        every = torch.full((len(self.block_names),), found, dtype=torch.float64)
        left_out = misfit(
            self._sample_of(data),
            self._inverse(facts, every, power=0.5),
            [piece.grid for piece in pieces],
            found,
            float(facts[OBSERVATIONS][2]),
        )
        return every / left_out

    def _evidence(self, pieces: list[FittedPiece], facts: Facts, data: DataSet) -> float:
        # weights of norms lie about 1 and rows of tables are drawn large: a prior about 0 is none
        # of theirs
        chosen = [piece for piece in pieces if piece.is_matrix] or pieces
        return evidence_damping(
            [piece.grid for piece in chosen],
            sum(piece.squared_weights for piece in chosen),
            Observations.of(facts[OBSERVATIONS], self._examples(data)),
        )

    def _data_at(self, place: int) -> DataSet:
        # a few of large gradients have as many products as many of small ones
        within = isqrt(SAMPLED_WORK // sum(self._partition.sizes))
        some = min(MOST_SAMPLED, max(LEAST_SAMPLED, within))
        return replace(super()._data_at(place), some=some)

    def _sample_of(self, data: DataSet) -> list[Gradients]:
        """Gradients of a few examples from all over the data, at labels of their own."""
        observed = self._observed(data, draw=2)
        return list(observed.weighted(data.sample, sum(self._partition.sizes)))

    def _refuse_old(self, facts: Facts) -> None:
        if OBSERVATIONS not in facts:
            raise InvalidArgumentError(
                f'damping="{self._damping}" takes the evidence of the fit, and this fit was saved '
                "by a version that had no part of it: call `fit()` again, give a number, or "
                'damping="mean", which "auto" was'
            )

    def _examples(self, data: DataSet) -> int:
        """The number of training examples."""
        if self._hessian_data is None:
            return data.count
        return DataSet(self.train_dataloader, self._device).count

    def _make_inverse(self, facts: Facts, damping: Tensor, data: DataSet) -> Transform:
        return self._inverse(facts, damping)

    def _inverse(self, facts: Facts, damping: Tensor, power: float = 1.0) -> KroneckerInverse:
        """Gradients through a power of the damped inverse."""
        values = damping_by_block(damping, len(self.block_names), positive=True).tolist()
        bases = {}
        for pieces, value in zip(self._fitted(facts).values(), values, strict=True):
            for piece in pieces:
                bases[piece.names[0]] = piece.basis(value, self._sample, self.rtol, power)
        return KroneckerInverse(bases)
