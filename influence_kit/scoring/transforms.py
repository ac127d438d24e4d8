"""Transforms of test and training gradients: functions from Gradients to Gradients."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from influence_kit.core.arguments import shown
from influence_kit.core.scaling import scaled_by_powers
from influence_kit.errors import InvalidArgumentError, NonFiniteError
from influence_kit.gradients.per_example import Gradients


def unit_norm(gradients: Gradients) -> Gradients:
    """Each gradient divided by its norm, however small or large; a zero gradient stays zero."""
    if not isinstance(gradients, Gradients):
        raise InvalidArgumentError(
            "`unit_norm` takes influence_kit.gradients.Gradients, as sides pass them to their "
            f"transforms; got {shown(gradients)}"
        )
    gradients, squares, _ = gradients.balanced()
    return _divided(gradients, squares.sqrt())


def unit_influence(
    inverse: Callable[[Gradients], Gradients], form: Literal["theta", "l"], gradients: Gradients
) -> Gradients:
    """RelatIF: each gradient g over the root of g^T M g ("l") or the norm of M g ("theta").

    M is the inverse curvature. A zero gradient stays zero.

    Raises:
        NonFiniteError: if the result is too small for the gradients' precision.
    """
    solved, squares, of_solved = inverse(gradients).balanced()
    gradients, _, powers = gradients.balanced()
    if form == "theta":
        shifts = powers - of_solved
    else:
        squares = solved.paired(gradients)
        shifts = (powers - of_solved) / 2
    if bool((shifts < math.log2(torch.finfo(shifts.dtype).tiny)).any()):
        raise NonFiniteError(
            f'relative="{form}": the gradient of an example is so small, relative to its norm '
            f"under the inverse, that it is 0 in {shifts.dtype}; use float64 or a larger damping"
        )
    return scaled_by_powers(_divided(gradients, squares.sqrt()), shifts)


def _divided(gradients: Gradients, norms: Tensor) -> Gradients:
    # a norm that is not finite gives a NaN, which is refused, and not a zero
    factors = torch.where(torch.isfinite(norms), norms.reciprocal(), torch.nan)
    return gradients.scaled(torch.where(norms == 0, 0.0, factors))
