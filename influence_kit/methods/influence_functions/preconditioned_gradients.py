"""Preconditioned test gradients that a user passes instead of test examples.

Shapes: m test examples, P entries of a gradient, C checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from influence_kit.errors import InvalidArgumentError
from influence_kit.gradients.forms import Dense
from influence_kit.gradients.per_example import Gradients


def check_preconditioned(quantities: Tensor, each: int, count: int) -> None:
    """Refuse a tensor that is not ``[m, C * P]``.

    Args:
        quantities: the tensor.
        each: P, the number of entries of a gradient.
        count: C, the number of checkpoints.
    """
    if quantities.dim() != 2 or quantities.shape[1] != each * count:
        raise InvalidArgumentError(
            f"`inputs` is a tensor of shape {list(quantities.shape)}; preconditioned gradients "
            f"made by `compute_intermediate_quantities` have shape [m, {each * count}] here "
            f"({count} checkpoints x {each} parameters). Pass examples as a tuple, list or dict"
        )


def preconditioned_features(
    shapes: Mapping[str, torch.Size], count: int, sample: Tensor
) -> Callable[[int], Callable[[Any], Gradients]]:
    """For each checkpoint, the function that returns its part of ``[m, C * P]`` as gradients."""
    sizes = [math.prod(shape) for shape in shapes.values()]

    def features(index: int) -> Callable[[Any], Gradients]:
        def take(block: Tensor) -> Gradients:
            own = block.to(sample).split([sum(sizes)] * count, dim=1)[index]
            columns = zip(shapes.items(), own.split(sizes, dim=1), strict=True)
            forms = {name: Dense(values, shape) for (name, shape), values in columns}
            return Gradients(len(block), forms, shapes, sample)

        return take

    return features
