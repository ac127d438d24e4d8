"""Projected gradients that are divided by the root of the optimizer's second moments before.

Shapes: n examples, p entries of a parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from influence_kit.checkpoints.second_moments import SecondMomentsOf, second_moments
from influence_kit.errors import InvalidArgumentError
from influence_kit.gradients.forms import Dense
from influence_kit.gradients.per_example import Gradients
from influence_kit.projections.projected import Dim, Kind, Projected


class NormalizedProjected(Projected):
    r"""u = vec(P_o^T (G / (sqrt(V) + eps)) P_i), entry by entry: TrackStar's gradients.

    V are the second moments that a checkpoint's optimizer holds for the layer; an entry whose
    moment is zero, or of a parameter without a state, is zero. Written out, one layer at a time,
    since the quotient is no product of inputs and output gradients.

    Args:
        projection_dim, projection, seed: as for ``Projected``.
        optimizer: "adam" or "adafactor".
        parameter_names: the names of the optimizer's parameters in its order; None finds them.
        checkpoints: returns the checkpoints of the method.
    """

    def __init__(
        self,
        projection_dim: Dim = 4096,
        projection: Kind = "orthogonal",
        seed: int = 0,
        optimizer: SecondMomentsOf = "adam",
        parameter_names: Sequence[str] | None = None,
        checkpoints: Callable[[], Sequence[Any]] = list,
    ) -> None:
        super().__init__(projection_dim, projection, seed)
        self.optimizer, self.parameter_names = optimizer, parameter_names
        self._checkpoints = checkpoints

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "second moments": self.optimizer}

    def bind(self) -> None:
        super().bind()
        # the scales of one checkpoint
        self._held: tuple[int, Mapping[str, Tensor | None]] | None = None

    def forget(self) -> None:
        self._held = None

    def of_gradients(self, checkpoint: int, gradients: Gradients) -> Gradients:
        scales = self._scales(checkpoint, gradients.sample)
        forms: dict[str, Dense] = {}
        for name, unit in self.maps.maps.items():
            members = [n for n in unit.names if n in gradients.forms and scales[n] is not None]
            if members:
                width = sum(gradients.forms[n].p for n in members)
                slices = gradients.forms[members[0]].example_slices(4 * width)
                parts = [unit(self._divided(gradients.rows(s), members, scales)) for s in slices]
                values = torch.cat([part for part in parts if part is not None])
                forms[name] = Dense(values, torch.Size([unit.k]))
        return Gradients(gradients.n, forms, self.shapes, gradients.sample)

    def _divided(
        self, gradients: Gradients, names: Sequence[str], scales: Mapping[str, Tensor | None]
    ) -> Gradients:
        """The named gradients, each entry times its scale."""
        forms = {}
        for name in names:
            form, scale = gradients.forms[name], scales[name]
            assert scale is not None
            forms[name] = Dense(form.dense() * scale, gradients.parameters[name])
        return Gradients(gradients.n, forms, gradients.parameters, gradients.sample)

    def _scales(self, checkpoint: int, sample: Tensor) -> Mapping[str, Tensor | None]:
        if self._held is None or self._held[0] != checkpoint:
            self._held = None
            model, held = self.source.capture.model, self._checkpoints()[checkpoint]
            found = second_moments(model, held, self.optimizer, self.parameter_names)
            lacking = [name for name in self.gradient_shapes if name not in found]
            if lacking:
                raise InvalidArgumentError(
                    f"the optimizer of checkpoint {checkpoint} does not have the parameter "
                    f"'{lacking[0]}': it has {', '.join(found)}; leave it out with `layers`"
                )
            self._held = checkpoint, {n: found[n].scales(sample) for n in self.gradient_shapes}
        return self._held[1]
