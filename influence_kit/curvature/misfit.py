"""How much of the curvature an approximation of it leaves out, seen along gradients.

Blocks that curve together (layers that can do the same to the outputs) and eigenvectors that are
not quite those of the curvature leave out a part of it.

Shapes: s examples of a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from influence_kit.core.distributed import from_first_rank
from influence_kit.curvature.eigenbasis import Preconditioned
from influence_kit.gradients.per_example import Gradients


def misfit(
    sample: Sequence[Gradients],
    root: Callable[[Gradients], Gradients],
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
        root: times the root of M.
        eigenvalues: l.
        damping: lambda.
        excess: C over A where they are alike, by which A is multiplied here.

    Returns:
        1 also where there are no two examples.
    """
    if not sample:
        return 1.0
    squares = _products([root(part) for part in sample]).double().square().fill_diagonal_(0)
    pairs = max(1, len(squares) * (len(squares) - 1))
    found = float(from_first_rank(squares.sum())) / pairs
    shares = (values / (values + damping) for values in eigenvalues)
    expected = sum(float(share.double().square().sum()) for share in shares) * excess**2
    return max(1.0, found / expected - 1) if expected else 1.0


def _products(parts: Sequence[Gradients]) -> Tensor:
    """The inner products of all examples of all parts, ``[s, s]``; of each piece in one product."""
    starts = [0, *accumulate(part.n for part in parts)]
    total = parts[0].sample.new_zeros(starts[-1], starts[-1])
    for name in dict.fromkeys(name for part in parts for name in part.forms):
        forms = [
            (slice(start, start + part.n), part.forms[name])
            for start, part in zip(starts, parts, strict=False)
            if name in part.forms
        ]
        turned = [form.weighted for _, form in forms if isinstance(form, Preconditioned)]
        if len(turned) == len(forms):
            rows = torch.cat(turned).flatten(1)
            indices = torch.cat([torch.arange(own.start, own.stop) for own, _ in forms])
            indices = indices.to(total.device)
            total[indices[:, None], indices] += rows @ rows.T
            continue
        for test, one in forms:
            for train, other in forms:
                total[test, train] += other.inner(one, starts[-1])
    return total
