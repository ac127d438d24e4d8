"""The mean of outer products of gradients, of training and evaluation examples mixed.

Shapes: n training examples, m evaluation examples, P entries of a block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from influence_kit.core.arguments import check_number
from influence_kit.curvature.damping import MEAN, TRACE, DampingArgument
from influence_kit.curvature.fit_data import FitData
from influence_kit.curvature.inverse_curvature import State
from influence_kit.curvature.operator_inverses import (
    BlockArgument,
    Explicit,
    blocks_within_memory,
)
from influence_kit.curvature.outer_products import OuterProducts
from influence_kit.curvature.wording import Wording
from influence_kit.gradients.per_example import Transform
from influence_kit.operators.block import Block
from influence_kit.operators.indefinite import IndefiniteBlockError, indefinite

# the matrix is not a curvature
OF_GRADIENTS = Wording(matrix="R")
FLOAT64 = "a model in float64: R has negative eigenvalues by rounding alone"


class Autocorrelation(Explicit):
    """R = mixing * (mean of u u^T over evaluation examples) + (1 - mixing) * (over training ones).

    Args:
        damping: added to the eigenvalues of R; see ``InfluenceFunction``.
        mixing: the share of the evaluation examples; without those, R is that of the training set.
        blocks: "layer", "full", or names of features by block.
        seed: has no effect; the features have their own seed.
    """

    # as LoGra's: eigenvalues have other units than the model's learning rates
    rules = (MEAN, TRACE)
    wording = OF_GRADIENTS

    def __init__(
        self,
        damping: DampingArgument = "auto",
        mixing: float = 0.0,
        blocks: BlockArgument = "layer",
        seed: int = 0,
    ) -> None:
        super().__init__(damping, "empirical_fisher", blocks, seed)
        self.mixing = check_number(mixing, "mixing", least=0, most=1)

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "mixing": self.mixing}

    def blocks_at(self, data: FitData) -> list[Block]:
        of_training = super().blocks_at(data)
        if data.evaluation is None:
            return of_training
        examples, features = data.evaluation
        products = OuterProducts(features, examples, data.partition, data.sample)
        pairs = zip(of_training, blocks_within_memory(products), strict=True)
        return [_mixed(train, other, self.mixing) for train, other in pairs]

    def inverse(self, state: State, damping: Tensor, data: FitData) -> Transform:
        try:
            return super().inverse(state, damping, data)
        except IndefiniteBlockError as error:
            values, added = error.eigenvalues, error.damping
            raise indefinite(values, added, "R", remedy=FLOAT64) from None


def _mixed(train: Block, other: Block, share: float) -> Block:
    """The weighted mean of two blocks, as a matrix unless both are given by few rows."""
    if train.rows is None or other.rows is None:
        return Block((1 - share) * _matrix(train) + share * _matrix(other))
    n, m = len(train.rows), len(other.rows)
    # the mean over all rows is the mixture
    factors = [((1 - share) * (n + m) / n) ** 0.5, (share * (n + m) / m) ** 0.5]
    return Block.of_rows(torch.cat([train.rows * factors[0], other.rows * factors[1]]))


def _matrix(block: Block) -> Tensor:
    if block.rows is None:
        return block.core
    rows = block.rows.double()
    return rows.T @ rows / len(rows)
