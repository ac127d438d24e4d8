"""Projects the gradients of all parameters together: one vector per example.

Shapes: n examples, p entries of a parameter's gradient, k entries of the projection.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from influence_kit.core.dtypes import real_shape
from influence_kit.gradients.factored import Factored
from influence_kit.gradients.form import Form
from influence_kit.gradients.forms import Dense
from influence_kit.gradients.per_example import Gradients
from influence_kit.projections.maps import Placed, VectorMap
from influence_kit.projections.random_maps import random_map


@dataclass(frozen=True)
class JointProjection:
    """The gradients of all parameters, each projected to the same k entries, and added.

    Args:
        maps: the map of each parameter, to k entries.
        name: the name of the sum.
    """

    maps: Mapping[str, VectorMap]
    name: str

    @property
    def k(self) -> int:
        """The number of entries of the image."""
        return next(iter(self.maps.values())).k

    def of_parameters(self, gradients: Gradients) -> Gradients:
        """The summands ``[n, k]`` by parameter."""
        shape = torch.Size([self.k])
        forms = {name: Dense(values, shape) for name, values in self._summands(gradients)}
        return Gradients(gradients.n, forms, dict.fromkeys(self.maps, shape), gradients.sample)

    def _summands(self, gradients: Gradients) -> Iterator[tuple[str, Tensor]]:
        """The part of each parameter, one at a time, as there may be hundreds."""
        for name, form in gradients.forms.items():
            yield name, self._image(self.maps[name], form)

    def _image(self, project: VectorMap, form: Form) -> Tensor:
        if isinstance(form, Factored):
            factors = form.deltas, form.inputs
            return project.of_outer(*(reversed(factors) if form.transposed else factors))
        slices = form.example_slices(2 * form.p)
        return torch.cat([project(form.rows(rows).dense()) for rows in slices])

    def __call__(self, gradients: Gradients) -> Gradients:
        """The projected gradients, written out."""
        total = gradients.sample.new_zeros(gradients.n, self.k)
        for _, part in self._summands(gradients):
            total += part
        shape = torch.Size([self.k])
        forms = {self.name: Dense(total, shape)}
        return Gradients(gradients.n, forms, {self.name: shape}, gradients.sample)


def joint_projection(
    parameters: Mapping[str, nn.Parameter], kind: str, dim: int, name: str, *key: object
) -> JointProjection:
    """All parameters projected together.

    Args:
        parameters: the parameters by name.
        kind: the kind of random maps; "identity" concatenates all parameters.
        dim: the number of entries k.
        name: the name of the sum.
        key: the key of the random maps, in addition to the parameters' names.
    """
    shapes = {other: real_shape(parameter) for other, parameter in parameters.items()}
    sizes = {other: shape.numel() for other, shape in shapes.items()}
    if kind == "identity":
        starts = accumulate(sizes.values(), initial=0)
        placed = zip(sizes.items(), starts, strict=False)
        total = sum(sizes.values())
        return JointProjection({n: Placed(p, total, start) for (n, p), start in placed}, name)
    maps = {
        other: random_map(kind, p, dim, other, *key, rows=rows_of(shapes[other]))
        for other, p in sizes.items()
    }
    return JointProjection(maps, name)


def rows_of(shape: torch.Size) -> int:
    """The rows of a parameter as a matrix: 1 for a vector."""
    return shape[0] if len(shape) > 1 else 1
