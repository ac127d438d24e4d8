"""The damping that maximises the evidence of a Laplace approximation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from torch import Tensor

from influence_kit.curvature.observations import Observations
from influence_kit.errors import InvalidArgumentError

# relative error of the result, and the largest number of Newton steps and halvings
PRECISE, MOST_STEPS = 1e-12, 200


def evidence_damping(
    eigenvalues: Iterable[Tensor], squared_norm: float, observations: Observations
) -> float:
    r"""The damping of a curvature that corresponds to the prior precision of the largest evidence.

    .. math::
        \lambda = \frac{\delta}{N}, \qquad \delta = \frac{\gamma}{\|\theta\|^2}, \qquad
        \gamma = \sum_i \frac{N l_i}{N l_i + \delta}

    delta is the precision of a normal prior of the weights at which the Laplace approximation of
    the marginal likelihood is stationary, and gamma the number of parameters that the data
    determine (MacKay 1992, "Bayesian interpolation"; for networks Immer et al. 2021, arXiv
    2104.04975). The left side of gamma = N lambda |theta|^2 rises in lambda and the right side
    falls, so that there is one solution.

    Args:
        eigenvalues: l of the curvature of the mean loss, of any shapes; negative ones count as 0.
        squared_norm: the squared norm of the weights, |theta|^2.
        observations: N, by which the curvature is multiplied to be that of the negative
            log-likelihood. If a variance is estimated, N falls with gamma.

    Raises:
        InvalidArgumentError: if there is no solution: no eigenvalue is positive, all weights
            are zero, or all errors are.

    Example:
        >>> import torch
        >>> round(evidence_damping([torch.tensor([1.0, 0.5])], 2.0, Observations(10)), 4)
        0.0884
    """
    own = [values.detach().double().clamp(min=0) for values in eigenvalues]
    trace = math.fsum(float(values.sum()) for values in own)
    for value, what in (
        (trace, "no eigenvalue of the curvature is positive"),
        (squared_norm, "all weights are zero"),
    ):
        if not value > 0:
            raise InvalidArgumentError(f"the evidence has no maximum: {what}. Give a number")
    if not math.isfinite(observations.count) or not observations.count > 0:
        raise InvalidArgumentError(
            "the evidence has no maximum: the model's errors are all zero, and so is their "
            "variance. Give a number"
        )
    scale = observations.count * squared_norm
    # above the solution, if N does not fall
    at = 0.5 * math.log(trace / scale)
    low, high = -math.inf, math.inf
    for _ in range(MOST_STEPS):
        excess, slope = _excess(own, at, scale, observations.values)
        low, high = (at, high) if excess > 0 else (low, at)
        step = math.inf if slope == 0 else -excess / slope
        if abs(step) < PRECISE:
            break
        at = _inside(at + step, at, low, high)
    return math.exp(at)


def _excess(
    eigenvalues: Sequence[Tensor], log_damping: float, scale: float, values: float
) -> tuple[float, float]:
    """Log gamma - log(N lambda |theta|^2) and its slope in log lambda, in which it falls.

    Infinite, with slope 0, if more parameters would be determined than there are values.
    """
    damping = math.exp(log_damping)
    gamma = falls = 0.0
    for own in eigenvalues:
        share = own / (own + damping)
        gamma += float(share.sum())
        falls += float((share * (1 - share)).sum())
    free = 1 - gamma / values
    if free <= 0 or gamma == 0:
        return (math.inf if free <= 0 else -math.inf), 0.0
    excess = math.log(gamma) - math.log(free) - log_damping - math.log(scale)
    return excess, -falls / gamma - falls / values / free - 1


def _inside(wanted: float, at: float, low: float, high: float) -> float:
    """Newton's next point, or the middle of the known bounds if it is outside of them."""
    if low < wanted < high:
        return wanted
    if math.isinf(low):
        return min(at, high) - 3
    return max(at, low) + 3 if math.isinf(high) else (low + high) / 2
