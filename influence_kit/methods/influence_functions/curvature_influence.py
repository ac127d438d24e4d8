"""Influence functions with a choice of curvature and blocks."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from influence_kit.curvature.curvature import (
    Curvature,
    GaussNewton,
    HessianOfLoss,
)
from influence_kit.curvature.outer_products import OuterProducts
from influence_kit.curvature.passes import DataSet
from influence_kit.errors import InvalidArgumentError
from influence_kit.methods.influence_functions.damping import (
    LEARNING_RATES,
    MEAN,
    TRACE,
    DampingArgument,
)
from influence_kit.methods.influence_functions.fitted import Facts
from influence_kit.methods.influence_functions.influence_function import InfluenceFunction
from influence_kit.methods.influence_functions.plain_check import LEAST_OF_LAYERS, LEAST_OF_WHOLE
from influence_kit.methods.parameter_selection import choose_blocks

CurvatureName = Literal["ggn", "hessian", "fisher", "empirical_fisher"]
BlockArgument = Literal["full", "layer", "parameter"] | Mapping[str, Sequence[str]]
CURVATURES = ("ggn", "hessian", "fisher", "empirical_fisher")


class CurvatureInfluence(InfluenceFunction):
    """An influence function whose curvature is known by products with vectors.

    Args:
        curvature: "ggn" (Gauss-Newton, J^T H J: the Hessian for models that are linear in their
            parameters, and never negative for a loss that is convex in the outputs), "hessian" (may
            be indefinite away from a minimum), "fisher" (outer products of gradients at labels
            drawn from the model) or "empirical_fisher" (at the labels of the data).
        blocks: "full", "layer", "parameter", or names of parameters by block: what is between
            blocks is taken for zero, and a parameter that no block has for frozen.
    """

    # found to serve convex models and networks alike
    _auto_rule, _auto_share = TRACE, 1.0
    _rules: Sequence[str] = (MEAN, TRACE, LEARNING_RATES)

    def __init__(
        self,
        *args: Any,
        damping: DampingArgument = "auto",
        curvature: CurvatureName = "ggn",
        blocks: BlockArgument = "full",
        hessian_dataset: Dataset[Any] | DataLoader[Any] | None = None,
        relative: Literal["theta", "l"] | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        if curvature not in CURVATURES:
            raise InvalidArgumentError(
                f"`curvature` must be one of {', '.join(CURVATURES)}; got {curvature!r}"
            )
        self.curvature = curvature
        self.blocks = blocks
        super().__init__(
            *args,
            damping=damping,
            hessian_dataset=hessian_dataset,
            relative=relative,
            seed=seed,
            **kwargs,
        )

    def _blocks_of(self, names: list[str]) -> Mapping[str, list[str]]:
        return choose_blocks(self.model, names, self.blocks)

    @property
    def _least_agreement(self) -> float:
        return LEAST_OF_WHOLE if self.blocks == "full" else LEAST_OF_LAYERS

    def _curvature(self, data: DataSet) -> Curvature:
        """The curvature at the checkpoint that is in the model."""
        if self.curvature in ("ggn", "hessian"):
            kind = GaussNewton if self.curvature == "ggn" else HessianOfLoss
            return kind(self._source, self._train_loss, data, self._partition, self._sample)
        return OuterProducts(
            self._curvature_features(self.curvature, data), data, self._partition, self._sample
        )

    def _traces(self, facts: Facts, data: DataSet) -> Tensor:
        return self._curvature(data).traces(self.seed)

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "curvature": self.curvature}
