"""How much of the curvature a block-diagonal approximation leaves out, measured on gradients.

It leaves out a part if blocks are coupled (layers with similar effects on the outputs), and if its
eigenvectors are not exactly those of the curvature.

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
) -> float:
    r"""The curvature that an approximation leaves out, relative to the approximation; at least 1.

    .. math::
        \rho = \frac{\|M^{1/2} (C - A) M^{1/2}\|^2}{\|M^{1/2} A M^{1/2}\|^2}
            = \frac{E_{i \ne j} (g_i^T M g_j)^2}{\sum_p (l_p / (l_p + \lambda))^2} - 1, \qquad
        M = (A + \lambda)^{-1}

    A is the part of C = E[g g^T] that is diagonal in a basis, with the eigenvalues l: C - A is the
    part off the diagonal. For L perfectly coupled layers, which A treats separately, rho is L - 1.

    Args:
        sample: gradients of independent examples, in parts.
        root: multiplies gradients by the square root of M.
        eigenvalues: l, the eigenvalues of A.
        damping: lambda.

    Returns:
        The ratio; 1 also if there are fewer than two examples.
    """
    if not sample:
        return 1.0
    squares = _products([root(part) for part in sample]).double().square().fill_diagonal_(0)
    pairs = max(1, len(squares) * (len(squares) - 1))
    found = float(from_first_rank(squares.sum())) / pairs
    shares = (values / (values + damping) for values in eigenvalues)
    expected = sum(float(share.double().square().sum()) for share in shares)
    return max(1.0, found / expected - 1) if expected else 1.0


def _products(parts: Sequence[Gradients]) -> Tensor:
    """The inner products of all examples of all parts, ``[s, s]``, in one product per piece."""
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
