"""The damping argument: a number, one for each block, or a rule by name.

Shapes: B blocks.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from influence_kit.checkpoints.discovery import label_of
from influence_kit.core.arguments import check_number
from influence_kit.errors import InvalidArgumentError
from influence_kit.learning_rates.rate_sum import rate_sum

# rules that a class may know: a share of the mean eigenvalue of each block, a share of its trace
# over the directions in which n examples may curve, the Laplace evidence of all blocks together,
# and what stopping gradient descent after so many steps amounts to
MEAN, TRACE, EVIDENCE, LEARNING_RATES = "mean", "trace", "evidence", "learning_rates"
Rule = Literal["mean", "trace", "evidence", "learning_rates"]
DampingArgument = float | Literal["auto"] | Rule | Mapping[str, float]
AUTO = "auto"
# of the rules "mean" and "trace", unless a class has its own
SHARE = 0.1


def check_damping(
    damping: DampingArgument,
    blocks: Sequence[str],
    name: str = "damping",
    rules: Sequence[str] = (MEAN, TRACE),
) -> DampingArgument:
    """The argument of that name, refused where it is no damping of these blocks."""
    if isinstance(damping, str):
        if damping not in (AUTO, *rules):
            known = ", ".join(f'"{rule}"' for rule in (AUTO, *rules))
            raise InvalidArgumentError(
                f"`{name}` must be a number, a dict by block or one of {known}; got {damping!r}"
            )
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


def as_text(name: str, damping: DampingArgument, rule: str | None, used: Sequence[float]) -> str:
    """A damping as it was given, with the rule that "auto" is and what was used.

    Args:
        name: of the argument.
        damping: the argument.
        rule: that it names or is; None of numbers.
        used: all values, of blocks and checkpoints.
    """
    if rule is None and not isinstance(damping, Mapping):
        return f"{name}={damping:g}"
    given = f'{name}="{damping}"' if rule is not None else f"{name} by block"
    named = "" if rule in (None, damping) else f' (rule "{rule}")'
    if not used:
        return f"{given}{named}, not fitted"
    low, high = f"{min(used):.3g}", f"{max(used):.3g}"
    return f"{given}{named}, {low}" + ("" if low == high else f" to {high}")


def share_of(
    traces: Tensor,
    blocks: Mapping[str, int],
    n: int,
    rule: str,
    share: float,
    argument: str,
) -> Tensor:
    """The rules "mean" and "trace", ``[B]``.

    Args:
        traces: of the blocks, ``[B]``.
        blocks: how many eigenvalues each has, by name.
        n: the number of examples.
        rule: "mean" (the trace over all eigenvalues) or "trace" (over n of them at most).
        share: of that, which is the damping.
        argument: what was given, for the error.

    Raises:
        InvalidArgumentError: where a trace is not positive.
    """
    counts = torch.tensor(list(blocks.values()), device=traces.device)
    means = traces / (counts if rule == MEAN else counts.clamp(max=n))
    for value, block in zip(means.tolist(), blocks, strict=True):
        if not value > 0:
            raise InvalidArgumentError(
                f"{argument} is a share of the mean eigenvalue of the curvature, which is "
                f"{value:.4g} in block '{block}': the gradients there are zero or the "
                "curvature is negative. Give a number, leave that block out by `layers`, or use "
                'another curvature ("ggn" is never negative)'
            )
    return share * means


def early_stopping(checkpoints: Sequence[Any], index: int, rules: Sequence[str]) -> float:
    r"""The rule "learning_rates": the damping that stopping gradient descent amounts to.

    .. math::
        \lambda = \frac{1 - \mu}{\sum_{t=1}^{T} \eta_t}

    for the T steps before the checkpoint, of rates eta and momentum mu. Gradient descent has then
    moved along an eigenvector of the mean loss's curvature of eigenvalue l by the share
    1 - (1 - eta l)^T of the way to the minimum, which is near l / (l + lambda) for all l (a half at
    l = lambda against 1 - 1 / e). ``rate_sum`` says what is exact and what is interpolated.

    Args:
        checkpoints: of one run.
        index: of the one in question.
        rules: the other rules that there are, for the error.

    Raises:
        InvalidArgumentError: where the sum is not known, or the optimizer is not SGD.
    """
    try:
        return 1 / rate_sum(checkpoints, index).value
    except InvalidArgumentError as error:
        others = ", ".join(f'"{rule}"' for rule in (AUTO, *rules) if rule != LEARNING_RATES)
        raise InvalidArgumentError(
            f'damping="{LEARNING_RATES}" is one over the sum of the learning rates of SGD, which '
            f"is not known of checkpoint {index} ({label_of(checkpoints[index])}): {error}. Other "
            f"rules are {others}; or give a number"
        ) from error
