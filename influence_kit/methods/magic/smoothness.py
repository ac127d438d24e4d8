"""How smooth a run is: the change that derivatives predict against the real one.

Shapes: m test examples, n training examples.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from influence_kit.core.tables import text_table


@dataclass(frozen=True)
class Smoothness:
    """Predicted and real changes when the weights of some training examples are lowered a little.

    Where training is smooth at this scale, both agree: ``error`` is near 0 and ``correlation`` near
    1, and sums of scores predict what leaving groups of examples out does. Kinks (ReLU, clipping
    that sets in), large learning rates and long runs of small batches make the real change deviate.
    With an ``error`` near 1 the derivative holds for changes smaller than this one only; ranks may
    still be of use: an MLP on digits had an ``error`` of 0.4 to 1 with ReLU, where sums of scores
    had a rank correlation of 0.7 to 0.8 with the change of leaving 5% out, and of 0.02 with tanh,
    where it was above 0.95 (``benchmarks/RESULTS.md``).

    Args:
        predicted: the change of the test loss (or output) by the scores, ``[m]``.
        real: the change when the run was repeated with the lowered weights, ``[m]``.
        indices: the training examples whose weights were lowered.
        change: by how much.
    """

    predicted: Tensor
    real: Tensor
    indices: Tensor
    change: float

    @property
    def error(self) -> float:
        """The norm of the difference, relative to that of the real change; 0 if both are 0."""
        off, size = float((self.predicted - self.real).norm()), float(self.real.norm())
        return off / size if size else off and math.inf

    @property
    def correlation(self) -> float:
        """The correlation of predicted and real changes over the test examples, two or more."""
        pairs = torch.stack([self.predicted, self.real]).double()
        return float(torch.corrcoef(pairs)[0, 1])

    def __str__(self) -> str:
        rows = [
            ["test examples", str(len(self.real))],
            ["training examples", f"{len(self.indices)}, weights lowered by {self.change:g}"],
            ["relative error", f"{self.error:.3g}"],
            ["correlation", f"{self.correlation:.4f}"],
        ]
        return text_table(["smoothness of the run", ""], rows)


def drawn_examples(n: int, share: float, seed: int) -> Tensor:
    """A random share of n training examples, at least one."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(n, generator=generator)[: max(1, round(share * n))].sort().values
