"""The explicit inverse curvature of projected gradients."""

from influence_kit.core.arguments import shown
from influence_kit.core.objects import is_one_of
from influence_kit.curvature.damping import MEAN, TRACE, DampingArgument
from influence_kit.curvature.kronecker_curvature import FisherName
from influence_kit.curvature.operator_inverses import BlockArgument, Explicit
from influence_kit.errors import InvalidArgumentError


class ProjectedInverse(Explicit):
    """``Explicit`` with the defaults of LoGra and GraSS: the empirical Fisher, by layer."""

    # eigenvalues of projected gradients have other units than the model's learning rates
    rules = (MEAN, TRACE)

    def __init__(
        self,
        damping: DampingArgument = "auto",
        curvature: FisherName = "empirical_fisher",
        blocks: BlockArgument = "layer",
        seed: int = 0,
    ) -> None:
        if not is_one_of(curvature, ("fisher", "empirical_fisher")):
            raise InvalidArgumentError(
                '`curvature` must be "fisher" or "empirical_fisher" for projected gradients; got '
                f"{shown(curvature)}"
            )
        super().__init__(damping, curvature, blocks, seed)
