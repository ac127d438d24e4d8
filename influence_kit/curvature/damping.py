"""The damping argument: a number, one for each block, or a rule by name.

Shapes: B blocks.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from influence_kit.checkpoints.discovery import label_of
from influence_kit.core.arguments import check_number, shown
from influence_kit.errors import InvalidArgumentError
from influence_kit.learning_rates.rate_sum import rate_sum

# rules that a class may support: a share of the mean eigenvalue of each block, a share of its trace
# over the largest rank that n examples allow, the Laplace evidence of all blocks together, and the
# regularisation that corresponds to stopping gradient descent early
MEAN, TRACE, EVIDENCE, LEARNING_RATES = "mean", "trace", "evidence", "learning_rates"
Rule = Literal["mean", "trace", "evidence", "learning_rates"]
DampingArgument = float | Literal["auto"] | Rule | Mapping[str, float]
AUTO = "auto"
# the share of the rules "mean" and "trace", unless a class has its own
SHARE = 0.1


def check_damping(
    damping: DampingArgument,
    blocks: Sequence[str],
    name: str = "damping",
    rules: Sequence[str] = (MEAN, TRACE),
) -> DampingArgument:
    """The argument of that name; an error if it is not a damping of these blocks."""
    if isinstance(damping, str):
        if damping not in (AUTO, *rules):
            known = ", ".join(f'"{rule}"' for rule in (AUTO, *rules))
            raise InvalidArgumentError(
                f"`{name}` must be a number, a dict by block or one of {known}; got "
                f"{shown(damping)}"
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
    """A damping as given, with the rule that "auto" stands for and the values used.

    Args:
        name: the name of the argument.
        damping: the argument.
        rule: its rule; None for numbers.
        used: the values for all blocks and checkpoints.
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
        traces: the traces of the blocks, ``[B]``.
        blocks: the number of eigenvalues of each block, by name.
        n: the number of examples.
        rule: "mean" (the trace over all eigenvalues) or "trace" (over at most n of them).
        share: the factor by which that is multiplied.
        argument: the argument as given, for errors.

    Raises:
        InvalidArgumentError: if a trace is not positive.
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
    r"""The rule "learning_rates": the damping that corresponds to stopping gradient descent early.

    .. math::
        \lambda = \frac{1 - \mu}{\sum_{t=1}^{T} \eta_t}

    for the T steps before the checkpoint, with learning rates eta and momentum mu. Along an
    eigenvector of the mean loss's curvature with eigenvalue l, gradient descent has then covered
    the share 1 - (1 - eta l)^T of the way to the minimum, which is near l / (l + lambda) for all l
    (at l = lambda: 1 - 1 / e, against 1 / 2). ``rate_sum`` documents what is exact and what is
    interpolated.

    Args:
        checkpoints: the checkpoints of one run.
        index: the index of the checkpoint.
        rules: the rules of the class, for the error.

    Raises:
        InvalidArgumentError: if the sum is not known, or the optimizer is not SGD.
    """
    try:
        return 1 / rate_sum(checkpoints, index).value
    except InvalidArgumentError as error:
        others = ", ".join(f'"{rule}"' for rule in (AUTO, *rules) if rule != LEARNING_RATES)
        raise InvalidArgumentError(
            f'damping="{LEARNING_RATES}" is one over the sum of the learning rates of SGD, which '
            f"is not known for checkpoint {index} ({label_of(checkpoints[index])}): {error}. Other "
            f"rules are {others}; or give a number"
        ) from error
