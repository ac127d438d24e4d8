"""What a side may do to gradients: each takes Gradients and gives Gradients."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from influence_kit.gradients.per_example import Gradients


def unit_norm(gradients: Gradients) -> Gradients:
    """Each example's gradient divided by its norm; a zero gradient stays zero."""
    return _divided(gradients, gradients.squared_norms().sqrt())


def unit_influence(
    inverse: Callable[[Gradients], Gradients], form: Literal["theta", "l"], gradients: Gradients
) -> Gradients:
    """RelatIF: over the root of g^T M g ("l") or the norm of M g ("theta"), M an inverse."""
    solved = inverse(gradients)
    squares = solved.squared_norms() if form == "theta" else solved.paired(gradients)
    return _divided(gradients, squares.sqrt())


def _divided(gradients: Gradients, norms: Tensor) -> Gradients:
    return gradients.scaled(torch.where(norms > 0, norms.reciprocal(), norms))
