"""The derivative of clipping gradients by their norm, as ``clip_grad_norm_`` does it."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# what torch adds to the norm
EPS = 1e-6


@dataclass(frozen=True)
class Clipping:
    """Gradients g times min(1, c / (|g| + 1e-6)), the norm over all parameters together.

    Args:
        gradients: the gradients before clipping, by parameter.
        most: c; None for no clipping.
    """

    gradients: Mapping[str, Tensor]
    most: float | None

    @property
    def norm(self) -> Tensor:
        """The norm of all gradients."""
        norms = [torch.linalg.vector_norm(gradient) for gradient in self.gradients.values()]
        norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return norm

    @property
    def factor(self) -> Tensor | None:
        """The factor of the gradients; None if clipping changes nothing."""
        if self.most is None:
            return None
        factor = self.most / (self.norm + EPS)
        return factor if bool(factor < 1) else None

    def clipped(self) -> Mapping[str, Tensor]:
        """The gradients after clipping."""
        factor = self.factor
        if factor is None:
            return self.gradients
        return {name: factor * gradient for name, gradient in self.gradients.items()}

    def pull(self, adjoint: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The adjoints of the gradients before clipping, given those after it ``[m, *shape]``."""
        factor, norm = self.factor, self.norm
        if factor is None:
            return dict(adjoint)
        along = sum(
            (adjoint[name].flatten(1) @ self.gradients[name].flatten() for name in adjoint),
            start=norm.new_zeros(()),
        )
        # d factor / d norm = -factor / (norm + eps), d norm / d g = g / norm
        shrink = along * factor / ((norm + EPS) * norm)
        before = {}
        for name, gradient in self.gradients.items():
            turned = torch.tensordot(shrink, gradient, dims=0)
            own = adjoint.get(name)
            before[name] = -turned if own is None else factor * own - turned
        return before
