"""The damping argument: a number, one a block, or "auto"."""

from collections.abc import Mapping, Sequence
from typing import Literal

from influence_kit.arguments import check_number
from influence_kit.errors import InvalidArgumentError

DampingArgument = float | Literal["auto"] | Mapping[str, float]
# of "auto": the damping as a part of the mean eigenvalue of a block
AUTO_SHARE = 0.1


def check_damping(
    damping: DampingArgument, blocks: Sequence[str], name: str = "damping"
) -> DampingArgument:
    """The argument of that name, refused where it is no damping of these blocks."""
    if isinstance(damping, str):
        if damping != "auto":
            raise InvalidArgumentError(f'`{name}` must be a number or "auto"; got {damping!r}')
        return damping
    if isinstance(damping, Mapping):
        if set(damping) != set(blocks):
            raise InvalidArgumentError(
                f"`{name}` names the blocks {list(damping)}; there are {list(blocks)}, and each "
                "needs one"
            )
        return {
            block: check_number(value, f"{name}` of block `{block}", least=0)
            for block, value in damping.items()
        }
    return check_number(damping, name, least=0)


def share_of(
    means: Sequence[float],
    blocks: Sequence[str],
    share: float = AUTO_SHARE,
    argument: str = "damping",
) -> list[float]:
    """The automatic damping of each block, of which the mean eigenvalues are known."""
    for value, name in zip(means, blocks, strict=True):
        if not value > 0:
            raise InvalidArgumentError(
                f'{argument}="auto" is a share of the mean eigenvalue of the curvature, which is '
                f"{value:.4g} in block '{name}': the gradients there are zero or the "
                "curvature is negative. Give a number, leave that block out by `layers`, or use "
                'another curvature ("ggn" is never negative)'
            )
    return [share * value for value in means]
