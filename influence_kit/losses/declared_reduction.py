"""The reduction that a loss declares: one loss per example, or their sum or mean."""

import warnings

from influence_kit.core.arguments import check_flag
from influence_kit.errors import InvalidArgumentError
from influence_kit.losses.loss import LossFunction


def declared_reduction(
    loss_fn: LossFunction | None, sample_wise: bool | None, name: str = "loss_fn"
) -> str | None:
    """The loss's reduction: "none", "sum" or "mean", or None if only a call can show it.

    With ``sample_wise`` None any loss is accepted; True and False follow the rules of Captum's
    ``sample_wise_grads_per_batch``.
    """
    if sample_wise is not None:
        check_flag(sample_wise, "sample_wise_grads_per_batch")
    if loss_fn is None:
        return None
    known = getattr(loss_fn, "reduction", None)
    if sample_wise is None:
        return known if known in ("none", "sum", "mean") else None
    wanted = ("sum", "mean") if sample_wise else ("none",)
    if known in wanted:
        return known
    flag = f"`sample_wise_grads_per_batch` is {sample_wise}"
    words = " or ".join(f'"{word}"' for word in wanted)
    if known is not None:
        raise InvalidArgumentError(
            f'reduction for `{name}` must be {words} when {flag}; got "{known}". Leave '
            "`sample_wise_grads_per_batch` out to use a loss of any reduction"
        )
    meaning = "the sum over the batch" if sample_wise else "one loss per example"
    warnings.warn(
        f"`{name}` has no attribute `reduction`; since {flag}, it is assumed to return {meaning}",
        stacklevel=4,
    )
    return wanted[0]
