"""How much of the curvature an approximation of it leaves out, seen along gradients.

Blocks that curve together (layers that can do the same to the outputs) and eigenvectors that are
not quite those of the curvature leave out a part of it.

Shapes: s examples of a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from influence_kit.distributed import from_first_rank
from influence_kit.gradients.per_example import Gradients


def misfit(
    sample: Sequence[Gradients],
    inverse: Callable[[Gradients], Gradients],
    eigenvalues: Sequence[Tensor],
    damping: float,
    excess: float,
) -> float:
    r"""The curvature that an approximation leaves out, over what it has; 1 at least.

    .. math::
        \rho = \frac{\|M^{1/2} (C - A) M^{1/2}\|^2}{\|M^{1/2} A M^{1/2}\|^2}
            = \frac{E_{i \ne j} (g_i^T M g_j)^2}{\sum_p (l_p / (l_p + \lambda))^2} - 1, \qquad
        M = (A + \lambda)^{-1}

    A is the part of C = E[g g^T] that is diagonal in a basis, l its eigenvalues there: what is left
    out, C - A, is all that lies beside the diagonal. Of L layers that curve as one, of which A has
    each by itself, rho is L - 1.

    Args:
        sample: gradients of independent examples, in parts.
        inverse: times M.
        eigenvalues: l.
        damping: lambda.
        excess: C over A where they are alike, by which A is multiplied here.

    Returns:
        1 also where there are no two examples.
    """
    total = torch.zeros(2, dtype=torch.float64, device=eigenvalues[0].device)
    for number, test in enumerate(sample):
        solved = inverse(test)
        for other, train in enumerate(sample[: number + 1]):
            squares = train.inner(solved, train.n).double().square()
            own = other == number
            if own:
                squares.fill_diagonal_(0)
            pairs = squares.numel() - test.n * own
            # those of two parts stand for both orders
            total += torch.stack([squares.sum(), squares.new_tensor(pairs)]) * (2 - own)
    found, pairs = from_first_rank(total).tolist()
    shares = (values / (values + damping) for values in eigenvalues)
    expected = sum(float(share.double().square().sum()) for share in shares) * excess**2
    return max(1.0, found / pairs / expected - 1) if pairs and expected else 1.0
