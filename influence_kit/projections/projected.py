"""Projected gradients as features: layer by layer, from both sides or through a mask."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor

from influence_kit.core.arguments import check_count, shown
from influence_kit.core.distributed import from_first_rank
from influence_kit.core.draws import check_seed, key_of
from influence_kit.core.dtypes import real_shape
from influence_kit.core.objects import is_one_of
from influence_kit.data.batches import Batch
from influence_kit.errors import InvalidArgumentError
from influence_kit.gradients.feature_map import FeatureMap
from influence_kit.gradients.forms import Dense
from influence_kit.gradients.per_example import Gradients, join_examples
from influence_kit.losses.loss import Loss
from influence_kit.projections.learnt_mask import learnt_mask
from influence_kit.projections.maps import Composed, Coordinates, Identity, VectorMap
from influence_kit.projections.projection import Projection, columns_within, from_both_sides, whole
from influence_kit.projections.random_maps import random_map, shortened
from influence_kit.projections.unit_maps import TwoSided, UnitMap, WrittenOut
from influence_kit.projections.units import Unit, units_of

Dim = int | Sequence[int]
Kind = Literal["gaussian", "rademacher", "orthogonal", "identity"]
KINDS = ("gaussian", "rademacher", "orthogonal", "identity")
# examples from which a mask is learnt
SAMPLE = 64
MASKS = "mask of "


class Projected(FeatureMap):
    r"""u = vec(P_o^T G P_i): the gradient G of each layer, projected from both sides (LoGra).

    Args:
        projection_dim: a pair, the columns of P_o and P_i, or the most entries of u: then the root
            of it for each side, and what a shorter side leaves for the other. A side that has no
            more entries stays as it is.
        projection: the kind of the random maps: "orthogonal", "gaussian", "rademacher" or
            "identity" (nothing is projected).
        seed: of the maps; that of a layer depends on its name alone.
    """

    is_short = True

    def __init__(
        self, projection_dim: Dim = 4096, projection: Kind = "orthogonal", seed: int = 0
    ) -> None:
        self.projection_dim = check_dim(projection_dim)
        self.projection = check_kind(projection)
        self.seed = check_seed(seed)

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "features": "projected gradients",
            "projection": [type(self).__name__, self.projection],
            "projection_dim": self.projection_dim,
            "seed": self.seed,
        }

    def bind(self) -> None:
        capture = self.source.capture
        units = units_of(capture.model, capture.parameters)
        self.maps = Projection({unit.names[0]: self.map_of(unit) for unit in units})

    def map_of(self, unit: Unit) -> UnitMap:
        """What the gradient of a unit (a weight with its bias, or a parameter) becomes."""
        shape = self._shape(unit.names[0])
        return from_both_sides(unit, shape, self.projection, self.projection_dim, self.seed)

    def _shape(self, name: str) -> torch.Size:
        return real_shape(self.source.capture.parameters[name])

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        return self.maps.shapes

    def of_gradients(self, checkpoint: int, gradients: Gradients) -> Gradients:
        return self.maps(gradients)

    def transpose(self, features: Gradients) -> Gradients:
        shapes, sample = self.gradient_shapes, features.sample
        with torch.enable_grad():
            forms = {
                name: Dense(sample.new_zeros(features.n, shape.numel()).requires_grad_(), shape)
                for name, shape in shapes.items()
            }
            projected = self.maps(Gradients(features.n, forms, shapes, sample)).flat()
        values = [form.values for form in forms.values()]
        lifted = torch.autograd.grad(projected, values, features.flat())
        found = {name: Dense(part, shapes[name]) for name, part in zip(shapes, lifted, strict=True)}
        return Gradients(features.n, found, shapes, sample)


class FactMasked(Projected):
    """u = S vec(M_o^T G M_i): masks keep entries of both sides, S adds them up (FactGraSS).

    Args:
        projection_dim: entries of u, of each layer; a layer with fewer stays as it is.
        blow_up: how many times as many products the masks keep.
        seed: of masks and projection; those of a layer depend on its name alone.
    """

    projection_dim: int

    def __init__(self, projection_dim: int = 4096, blow_up: int = 4, seed: int = 0) -> None:
        self.projection_dim = check_count(projection_dim, "projection_dim")
        self.blow_up = check_count(blow_up, "blow_up")
        self.projection, self.seed = "sjlt", check_seed(seed)

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "blow_up": self.blow_up}

    def sparse(self, p: int, name: str) -> VectorMap:
        """The sparse projection of the p entries that a mask keeps."""
        return shortened("sjlt", p, self.projection_dim, self.seed, name)

    def map_of(self, unit: Unit) -> UnitMap:
        name, dim = unit.names[0], self.projection_dim
        if not unit.is_matrix:
            shape = self._shape(name)
            return WrittenOut({name: shape}, self.sparse(shape.numel(), name))
        if unit.outputs * unit.inputs <= dim:
            return whole(unit)
        left, right = columns_within(self.blow_up * dim, unit.outputs, unit.inputs)
        return TwoSided(
            unit,
            shortened("mask", unit.outputs, left, self.seed, name, "outputs"),
            shortened("mask", unit.inputs, right, self.seed, name, "inputs"),
            self.sparse(left * right, name),
        )


class Masked(FactMasked):
    """u = S M g: of a layer's whole gradient g a mask keeps entries, S adds them up (GraSS).

    Args:
        projection_dim: entries of u, of each layer; a layer with fewer stays as it is.
        mask: "random", or "learnt" from the gradients of 64 training examples, spread over the
            training set, at the first checkpoint: the entries that keep their inner products best.
        blow_up: how many times as many entries the mask keeps.
        seed: of mask and projection; that of a layer depends on its name alone.
    """

    writes_out = True

    def __init__(
        self,
        projection_dim: int = 4096,
        mask: Literal["random", "learnt"] = "random",
        blow_up: int = 4,
        seed: int = 0,
    ) -> None:
        if not is_one_of(mask, ("random", "learnt")):
            raise InvalidArgumentError(f'`mask` must be "random" or "learnt"; got {shown(mask)}')
        self.mask = mask
        super().__init__(projection_dim, blow_up, seed)

    def bind(self) -> None:
        super().bind()
        self._is_learnt = self.mask == "random"

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "mask": self.mask}

    @property
    def cached_settings(self) -> dict[str, Any]:
        if self.mask == "random":
            return super().cached_settings
        # learnt elsewhere it may differ, and so would the meaning of the columns
        chosen = {name: mask.chosen.tolist() for name, (_, mask) in self._masked().items()}
        return {**super().cached_settings, "learnt mask": f"{key_of(chosen):032x}"}

    def map_of(self, unit: Unit) -> UnitMap:
        shapes = {name: self._shape(name) for name in unit.names}
        p, name = sum(shape.numel() for shape in shapes.values()), unit.names[0]
        if p <= self.projection_dim:
            return WrittenOut(shapes, Identity(p))
        kept = min(p, self.blow_up * self.projection_dim)
        mask = random_map("mask", p, kept, self.seed, name)
        return WrittenOut(shapes, Composed(mask, self.sparse(kept, name)))

    # The learnt mask: of the first checkpoint, for all of them.

    @property
    def is_learnt(self) -> bool:
        return self._is_learnt

    def learn(self, examples: Callable[[Tensor], Iterable[Batch]], n: int, loss: Loss) -> None:
        if n < 3:
            raise InvalidArgumentError(
                f"a mask is learnt from correlations, which {n} training examples do not have; "
                'use mask="random"'
            )
        # from all over the training set, which may be in the order of its classes
        indices = torch.linspace(0, n - 1, min(n, SAMPLE)).round().long()
        sample = join_examples([self.source(batch, loss) for batch in examples(indices)])
        # ranks learn from the same examples, but rounding may choose between two entries
        self._set_masks(
            {
                name: from_first_rank(learnt_mask(_written_out(sample, unit), mask.k))
                for name, (unit, mask) in self._masked().items()
            }
        )

    @property
    def state(self) -> dict[str, Tensor]:
        if self.mask == "random":
            return {}
        return {f"{MASKS}{name}": mask.chosen for name, (_, mask) in self._masked().items()}

    def take_state(self, state: Mapping[str, Tensor]) -> None:
        if self.mask == "learnt":
            self._set_masks({name: state[f"{MASKS}{name}"] for name in self._masked()})

    @property
    def identifying(self) -> FeatureMap:
        return self if self.mask == "random" else FeatureMap().bound_to(self.source)

    def forget(self) -> None:
        self.bind()

    def _masked(self) -> dict[str, tuple[WrittenOut, Coordinates]]:
        """The units that have a mask, and their masks."""
        return {
            name: (unit, unit.map.first)
            for name, unit in self.maps.maps.items()
            if isinstance(unit, WrittenOut)
            and isinstance(unit.map, Composed)
            and isinstance(unit.map.first, Coordinates)
        }

    def _set_masks(self, chosen: Mapping[str, Tensor]) -> None:
        for name, (_, mask) in self._masked().items():
            mask.chosen, mask.scale = chosen[name], 1.0
        self._is_learnt = True


def _written_out(sample: Gradients, unit: WrittenOut) -> Tensor:
    forms = {name: form for name, form in sample.forms.items() if name in unit.shapes}
    return Gradients(sample.n, forms, unit.shapes, sample.sample).flat()


def check_dim(dim: Any) -> Any:
    """The argument ``projection_dim``, an int or a pair of them."""
    pair = isinstance(dim, tuple | list) and len(dim) == 2
    for value in dim if pair else (dim,):
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
            raise InvalidArgumentError(
                "`projection_dim` must be a positive int, or a pair of them (output side, input "
                f"side); got {shown(dim)}"
            )
    return tuple(map(int, dim)) if pair else int(dim)


def check_kind(projection: Any) -> Any:
    """The argument ``projection``, a kind of random maps."""
    if not is_one_of(projection, list(KINDS)):
        raise InvalidArgumentError(
            f"`projection` must be one of {', '.join(KINDS)}; got {shown(projection)}"
        )
    return projection
