"""The damped inverse of the curvature of a whole model, applied to test gradients.

Shapes: v rows and e entries of an embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from influence_kit.curvature.diagonal import Diagonal
from influence_kit.curvature.eigenbasis import Eigenbasis, Preconditioned
from influence_kit.curvature.matrix_layer import turned
from influence_kit.gradients.form import Form
from influence_kit.gradients.forms import Dense
from influence_kit.gradients.per_example import Gradients
from influence_kit.gradients.rows import Rows


@dataclass(frozen=True)
class Table:
    """The eigenbasis of an embedding, whose left basis is that of the ids.

    Args:
        weight: the parameter's name.
        right: the eigenvectors ``[e, e]``; None for the unit vectors.
        weights: 1 / (eigenvalues + damping), ``[v, e]``.
    """

    weight: str
    right: Tensor | None
    weights: Tensor

    def __call__(self, form: Form) -> Form:
        """Preconditioned gradients; rows stay the same rows."""
        if isinstance(form, Rows):
            values = turned(form.values, self.right) * self.weights[form.ids]
            return replace(form, values=self._back(values))
        # a sum over many examples
        values = turned(form.dense().view(-1, *self.weights.shape), self.right) * self.weights
        return Dense(self._back(values).flatten(1), form.shape)

    def _back(self, values: Tensor) -> Tensor:
        return values if self.right is None else values @ self.right.T


class KroneckerInverse:
    """The map to preconditioned gradients, piece by piece.

    Args:
        bases: the basis of each piece, by the name of its parameter or weight.
    """

    def __init__(self, bases: Mapping[str, Eigenbasis | Table | Diagonal]) -> None:
        self.bases = bases

    def __call__(self, gradients: Gradients) -> Gradients:
        """Preconditioned gradients; parameters without a basis are left out."""
        forms: dict[str, Form] = {}
        for name, basis in self.bases.items():
            form = gradients.forms.get(name)
            if form is None:
                continue
            if isinstance(basis, Eigenbasis):
                names = [n for n in (name, basis.layer.bias) if n is not None]
                forms[name] = Preconditioned({n: gradients.forms[n] for n in names}, basis)
            else:
                forms[name] = basis(form)
        return replace(gradients, forms=forms)
