"""What methods of projected gradients share: short vectors, kept; and their influence functions."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from numbers import Integral
from typing import Any, Literal

import torch

from influence_kit.core.dtypes import real_shape
from influence_kit.data.batches import Batch
from influence_kit.errors import InvalidArgumentError
from influence_kit.gradients.forms import Dense
from influence_kit.gradients.per_example import Gradients
from influence_kit.losses.loss import Loss
from influence_kit.methods.influence_functions.damping import MEAN, TRACE
from influence_kit.methods.influence_functions.explicit import ExplicitInfluenceFunction
from influence_kit.methods.inner_product import InnerProductInfluence
from influence_kit.projections.projection import Projection, from_both_sides
from influence_kit.projections.unit_maps import UnitMap
from influence_kit.projections.units import Unit, units_of

Dim = int | Sequence[int]
KINDS = ("gaussian", "rademacher", "orthogonal", "identity")


class ProjectedGradients(InnerProductInfluence):
    """A method whose gradients are projected, layer by layer, on both sides of its terms.

    Those of the training set are kept in memory where they fit.

    Args:
        projection_dim: entries for each layer: a number, or a pair (output side, input side).
        projection: the kind of the random maps.
        seed: of the random maps; that of a layer depends on its name alone.
    """

    projection: str
    projection_dim: Dim
    seed: int

    _keeps_rows = True

    def _map_of(self, unit: Unit) -> UnitMap:
        """What the gradient of a unit becomes."""
        shape = real_shape(self._parameters[unit.names[0]])
        return from_both_sides(unit, shape, self.projection, self.projection_dim, self.seed)

    @cached_property
    def _projection(self) -> Projection:
        units = units_of(self.model, self._parameters)
        return Projection({unit.names[0]: self._map_of(unit) for unit in units})

    @property
    def _shapes(self) -> Mapping[str, torch.Size]:
        return self._projection.shapes

    def _features(self, checkpoint: int, batch: Batch, loss: Loss) -> Gradients:
        return self._projection(super()._features(checkpoint, batch, loss))

    def _feature_settings(self) -> dict[str, Any]:
        return {"features": "projected gradients", **self._projection_settings()}

    def _projection_settings(self) -> dict[str, Any]:
        """What the projection is drawn from."""
        return {
            "projection": [self.get_name(), self.projection],
            "projection_dim": self.projection_dim,
            "seed": self.seed,
        }


class ProjectedInfluence(ExplicitInfluenceFunction, ProjectedGradients):
    r"""score = sum over blocks of u_test^T (F + damping I)^-1 u_train, u = projected gradients.

    .. math::
        \sum_l u'_l{}^T \, (F_l + \lambda_l I)^{-1} \, u_l, \qquad
        F_l = \frac{1}{n} \sum_j u_{jl} u_{jl}^T

    See ``LoGra`` for the arguments.
    """

    # eigenvalues of projected gradients are not in the units of steps of the model's
    _rules = (MEAN, TRACE)

    def __init__(
        self,
        *args: Any,
        projection_dim: Dim,
        curvature: Literal["fisher", "empirical_fisher"] = "empirical_fisher",
        blocks: Any = "layer",
        **kwargs: Any,
    ) -> None:
        if curvature not in ("fisher", "empirical_fisher"):
            raise InvalidArgumentError(
                '`curvature` must be "fisher" or "empirical_fisher" for projected gradients; got '
                f"{curvature!r}"
            )
        self.projection_dim = check_dim(projection_dim)
        super().__init__(*args, curvature=curvature, blocks=blocks, **kwargs)

    def _lifted(self, solved: Gradients) -> Gradients:
        """By the transposed projection: the inner products with gradients stay those with u."""
        shapes = {name: real_shape(parameter) for name, parameter in self._parameters.items()}
        sample = solved.sample
        with torch.enable_grad():
            forms = {
                name: Dense(sample.new_zeros(solved.n, shape.numel()).requires_grad_(), shape)
                for name, shape in shapes.items()
            }
            projected = self._projection(Gradients(solved.n, forms, shapes, sample)).flat()
        values = [form.values for form in forms.values()]
        lifted = torch.autograd.grad(projected, values, solved.flat())
        found = {name: Dense(part, shapes[name]) for name, part in zip(shapes, lifted, strict=True)}
        return Gradients(solved.n, found, shapes, sample)

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), **self._projection_settings()}

    @property
    def _fit_batches(self) -> Iterable[Batch]:
        if self._hessian_data is None and self.curvature == "empirical_fisher":
            return self._train_batches
        return self._hessian_loader


def check_dim(dim: Any) -> Any:
    """The argument ``projection_dim``, an int or a pair of them."""
    pair = isinstance(dim, tuple | list) and len(dim) == 2
    for value in dim if pair else (dim,):
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
            raise InvalidArgumentError(
                "`projection_dim` must be a positive int, or a pair of them (output side, input "
                f"side); got {dim!r}"
            )
    return tuple(map(int, dim)) if pair else int(dim)


def check_kind(projection: Any) -> Any:
    """The argument ``projection``, a kind of random maps."""
    if projection not in KINDS:
        raise InvalidArgumentError(
            f"`projection` must be one of {', '.join(KINDS)}; got {projection!r}"
        )
    return projection
