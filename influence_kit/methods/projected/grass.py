"""GraSS and FactGraSS: Hu et al. 2025, arXiv 2505.18976."""

from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from influence_kit.checkpoints.loader import CheckpointLoader
from influence_kit.core.arguments import check_count
from influence_kit.core.distributed import from_first_rank
from influence_kit.core.draws import key_of
from influence_kit.core.dtypes import real_shape
from influence_kit.curvature.passes import DataSet
from influence_kit.data.batches import take, to_device
from influence_kit.errors import InvalidArgumentError
from influence_kit.gradients.per_example import Gradients, join_examples
from influence_kit.methods.gradient_cache import KeptRows
from influence_kit.methods.influence_functions.fitted import Facts
from influence_kit.methods.projected.projected import ProjectedInfluence
from influence_kit.projections.learnt_mask import learnt_mask
from influence_kit.projections.maps import Composed, Coordinates, Identity, VectorMap
from influence_kit.projections.projection import columns_within, whole
from influence_kit.projections.random_maps import random_map, shortened
from influence_kit.projections.unit_maps import TwoSided, UnitMap, WrittenOut
from influence_kit.projections.units import Unit
from influence_kit.scoring.features import chosen_rows

# examples from which a mask is learnt
SAMPLE = 64
MASKS = "mask of "


class MaskedInfluence(ProjectedInfluence):
    """Gradients of which a mask takes some entries and a sparse projection adds up the rest.

    Args:
        blow_up: how many times as many entries the mask keeps as the projection.
    """

    projection = "sjlt"
    projection_dim: int

    def __init__(
        self, *args: Any, projection_dim: int = 4096, blow_up: int = 4, **kwargs: Any
    ) -> None:
        projection_dim = check_count(projection_dim, "projection_dim")
        self.blow_up = check_count(blow_up, "blow_up")
        super().__init__(*args, projection_dim=projection_dim, **kwargs)

    def _projection_settings(self) -> dict[str, Any]:
        return {**super()._projection_settings(), "blow_up": self.blow_up}

    def _sparse(self, p: int, name: str) -> VectorMap:
        """The sparse projection of p entries that are left."""
        return shortened("sjlt", p, self.projection_dim, self.seed, name)


class GraSS(MaskedInfluence):
    """score = sum over layers of u_test^T (F + damping I)^-1 u_train, u = S M g.

    ``LoGra`` with another projection: of a layer's whole gradient g the mask M keeps ``blow_up``
    times k entries, and the sparse Johnson-Lindenstrauss transform S adds them up to k entries with
    random signs (arXiv 2505.18976). F, sign, scale and what is kept are as there. Gradients are
    formed, one batch at a time; ``FactGraSS`` forms only what the mask keeps.

    Args:
        projection_dim: the letter k, of each layer; a layer with fewer entries stays as it is.
        mask: "random", or "learnt" from the gradients of 64 training examples, spread over the
            training set, at the first checkpoint: the entries that keep their inner products best.
        blow_up: how many times k entries the mask keeps.
        seed: of mask and projection; that of a layer depends on its name alone.

    The other arguments are those of ``LoGra``.

    Example:
        >>> import torch
        >>> model, x, y = torch.nn.Linear(20, 2), torch.randn(8, 20), torch.arange(8) % 2
        >>> train, loss = torch.utils.data.TensorDataset(x, y), torch.nn.CrossEntropyLoss()
        >>> grass = GraSS(model, train, [model.state_dict()], loss_fn=loss, projection_dim=16)
        >>> grass.influence((x[:4], y[:4]), k=3).indices.shape
        torch.Size([4, 3])
    """

    def __init__(
        self, *args: Any, mask: Literal["random", "learnt"] = "random", **kwargs: Any
    ) -> None:
        if mask not in ("random", "learnt"):
            raise InvalidArgumentError(f'`mask` must be "random" or "learnt"; got {mask!r}')
        self.mask = mask
        super().__init__(*args, **kwargs)

    def _projection_settings(self) -> dict[str, Any]:
        return {**super()._projection_settings(), "mask": self.mask}

    def _feature_settings(self) -> dict[str, Any]:
        settings = super()._feature_settings()
        if self._learnt:
            # learnt elsewhere it may differ, and so would the meaning of the columns
            chosen = {name: mask.chosen.tolist() for name, (_, mask) in self._masked.items()}
            settings["learnt mask"] = key_of(chosen)
        return settings

    def _map_of(self, unit: Unit) -> UnitMap:
        shapes = {name: real_shape(self._parameters[name]) for name in unit.names}
        p, name = sum(shape.numel() for shape in shapes.values()), unit.names[0]
        if p <= self.projection_dim:
            return WrittenOut(shapes, Identity(p))
        kept = min(p, self.blow_up * self.projection_dim)
        mask = random_map("mask", p, kept, self.seed, name)
        return WrittenOut(shapes, Composed(mask, self._sparse(kept, name)))

    # The learnt mask: of the first checkpoint, for all of them.

    def _forget(self) -> None:
        super()._forget()
        self._learnt = False

    @property
    def _kept_since(self) -> str | None:
        return super()._kept_since or ("the mask was learnt" if self._learnt else None)

    def _made_rows(self, loader: CheckpointLoader, show_progress: bool) -> KeptRows | None:
        if self.mask == "learnt" and not self._learnt:
            loader.load(0)
            sample = self._sample_gradients()
            # ranks learn from the same examples, but rounding may choose between two entries
            self._set_masks(
                {
                    name: from_first_rank(learnt_mask(self._written(sample, unit), mask.k))
                    for name, (unit, mask) in self._masked.items()
                }
            )
        return super()._made_rows(loader, show_progress)

    @cached_property
    def _masked(self) -> dict[str, tuple[WrittenOut, Coordinates]]:
        """The units that have a mask, and their masks."""
        return {
            name: (unit, unit.map.first)
            for name, unit in self._projection.maps.items()
            if isinstance(unit, WrittenOut)
            and isinstance(unit.map, Composed)
            and isinstance(unit.map.first, Coordinates)
        }

    def _set_masks(self, chosen: dict[str, Tensor]) -> None:
        for name, (_, mask) in self._masked.items():
            mask.chosen, mask.scale = chosen[name], 1.0
        self._learnt = True

    def _sample_gradients(self) -> Gradients:
        """Of examples from all over the training set, which may be in the order of its classes."""
        count = DataSet(self.train_dataloader, self._device).count
        if count < 3:
            raise InvalidArgumentError(
                f"a mask is learnt from correlations, which {count} training examples do not "
                'have; use mask="random"'
            )
        places = torch.linspace(0, count - 1, min(count, SAMPLE)).round().long()
        chosen = chosen_rows(self.train_dataloader, places, lambda: None)
        batches = (to_device(take(batch, rows), self._device) for _, rows, batch in chosen)
        return join_examples([self._source(batch, self._train_loss) for batch in batches])

    def _written(self, sample: Gradients, unit: WrittenOut) -> Tensor:
        forms = {name: form for name, form in sample.forms.items() if name in unit.shapes}
        return Gradients(sample.n, forms, unit.shapes, sample.sample).flat()

    def _measure(self, data: DataSet) -> Facts:
        masks = {f"{MASKS}{name}": mask.chosen for name, (_, mask) in self._masked.items()}
        return {**super()._measure(data), **(masks if self.mask == "learnt" else {})}

    def _take(self, place: int, facts: Facts) -> None:
        super()._take(place, facts)
        if self.mask == "learnt":
            self._set_masks({name: facts[f"{MASKS}{name}"] for name in self._masked})


class FactGraSS(MaskedInfluence):
    """score = sum over layers of u_test^T (F + damping I)^-1 u_train, u = S vec(M_o^T G M_i).

    ``GraSS`` for gradients G = sum_t d_t [a_t, 1]^T that are never formed: random masks keep some
    entries of the output gradients d and of the inputs a of each layer, ``blow_up`` times k
    products in all; only those are formed, and S adds them up to k entries with random signs (arXiv
    2505.18976). F, sign, scale and what is kept are as in ``LoGra``.

    Args:
        projection_dim: the letter k, of each layer; a layer with fewer entries stays as it is.
        blow_up: how many times k products the masks keep.
        seed: of masks and projection; those of a layer depend on its name alone.

    The other arguments are those of ``LoGra``.

    Example:
        >>> import torch
        >>> model, x, y = torch.nn.Linear(20, 2), torch.randn(8, 20), torch.arange(8) % 2
        >>> train, loss = torch.utils.data.TensorDataset(x, y), torch.nn.CrossEntropyLoss()
        >>> fact = FactGraSS(model, train, [model.state_dict()], loss_fn=loss, projection_dim=16)
        >>> fact.influence((x[:4], y[:4]), k=3).indices.shape
        torch.Size([4, 3])
    """

    def _map_of(self, unit: Unit) -> UnitMap:
        name, dim = unit.names[0], self.projection_dim
        if not unit.is_matrix:
            shape = real_shape(self._parameters[name])
            return WrittenOut({name: shape}, self._sparse(shape.numel(), name))
        if unit.outputs * unit.inputs <= dim:
            return whole(unit)
        left, right = columns_within(self.blow_up * dim, unit.outputs, unit.inputs)
        return TwoSided(
            unit,
            shortened("mask", unit.outputs, left, self.seed, name, "outputs"),
            shortened("mask", unit.inputs, right, self.seed, name, "inputs"),
            self._sparse(left * right, name),
        )
