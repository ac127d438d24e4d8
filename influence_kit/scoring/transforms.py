"""What a side may do to gradients: each takes Gradients and gives Gradients."""

import torch

from influence_kit.gradients.per_example import Gradients


def unit_norm(gradients: Gradients) -> Gradients:
    """Each example's gradient divided by its norm; a zero gradient stays zero."""
    norms = gradients.squared_norms().sqrt()
    return gradients.scaled(torch.where(norms > 0, norms.reciprocal(), norms))
