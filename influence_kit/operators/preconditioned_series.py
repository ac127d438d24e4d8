"""(C + damping)^-1 v by a stochastic series with a preconditioner.

Shapes: k vectors of P entries.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from influence_kit.core.arguments import check_count, check_number
from influence_kit.core.objects import check_functions, is_one_of
from influence_kit.core.scaling import balanced, times_powers
from influence_kit.errors import CurvatureError
from influence_kit.operators.damping_by_block import Damping, damping_by_block
from influence_kit.operators.operator import Operator, check_operator, check_vectors
from influence_kit.operators.partition import spread
from influence_kit.operators.solvers import (
    DIVERGED,
    MOST,
    Solve,
    refuse_non_finite_rows,
)

# the share of a series' iterations that is averaged where its products are sampled
AVERAGED = 0.5
# of the estimate of the largest eigenvalue: iterations, and samples
POWERS, SAMPLES = 20, 5


def preconditioned_series(
    operator: Operator,
    vectors: Tensor,
    damping: Damping,
    preconditioner: Solve,
    depth: int = 100,
    repeats: int = 1,
    scale: float | str = "auto",
    steps: Callable[[int], Callable[[Tensor], Tensor]] | None = None,
    tol: float = 0.0,
) -> Tensor:
    """(C + damping)^-1 v by ``h <- h + M (v - C_s h - damping h) / scale`` from ``h = M v``.

    M approximates (C + damping)^-1. The fixed point is (C + damping)^-1 v for any scale above half
    the largest eigenvalue of M (C + damping), and the number of iterations depends on the range of
    these eigenvalues rather than on those of C: ASTRA, arXiv 2507.14740, with M of EK-FAC. C_s is
    C, or with ``steps`` a sample of it; the result is then the mean over the last half of the
    iterations, in which the noise of the samples is averaged.

    Args:
        operator: C.
        vectors: ``[k, P]``.
        damping: added to C.
        preconditioner: M, a linear map of the rows of ``[k, P]``.
        depth: the most iterations.
        repeats: how often to run, each time with other samples; the results are averaged.
        scale: a number, or "auto": 1.1 times the largest eigenvalue of M (C_s + damping) by power
            iteration, over five samples with ``steps``.
        steps: gives the product with C_s for a repeat, a new sample per call; None for C itself.
        tol: without ``steps``: stop when no row moves by more than this, relatively.

    Raises:
        CurvatureError: if the series diverges.
        NonFiniteError: for a row that is NaN or infinite.
        InvalidArgumentError: for an invalid ``scale``, ``depth``, ``repeats`` or ``tol``.
    """
    check_vectors(vectors, check_operator(operator).size)
    functions = {"preconditioner": preconditioner, "steps": steps}
    check_functions(functions, "preconditioner(vectors) and steps(repeat)")
    check_count(depth, "depth", most=MOST)
    check_count(repeats, "repeats", most=MOST)
    check_number(tol, "tol", least=0, below=1)
    vectors, powers = balanced(refuse_non_finite_rows(vectors))
    lift = spread(damping_by_block(damping, len(operator.sizes)), operator.sizes).to(vectors)
    if is_one_of(scale, ("auto",)):
        scale = 1.1 * _largest_eigenvalue(operator, lift, preconditioner, repeats, steps)
    scale = check_number(scale, "scale", above=0, instead='"auto"')
    start = preconditioner(vectors)
    limit = DIVERGED * start.norm(dim=1).clamp(min=torch.finfo(vectors.dtype).tiny)
    total = torch.zeros_like(vectors)
    for repeat in range(repeats):
        product = operator.product if steps is None else steps(repeat)
        first = depth if steps is None else int((1 - AVERAGED) * depth)
        h, kept, mean = start, 0, torch.zeros_like(start)
        for iteration in range(depth):
            move = preconditioner(vectors - product(h) - lift * h) / scale
            h = h + move
            if not bool((h.norm(dim=1) <= limit).all()):
                raise CurvatureError(
                    f"the series diverges at scale {scale:.4g}: use a larger `scale`, a larger "
                    "damping, a larger `hessian_batch_size`, or curvature='ggn'"
                )
            if iteration >= first:
                kept += 1
                mean += (h - mean) / kept
            elif steps is None and bool((move.norm(dim=1) <= tol * h.norm(dim=1)).all()):
                break
        total += mean if kept else h
    return times_powers(total / repeats, powers)


def _largest_eigenvalue(
    operator: Operator,
    lift: Tensor,
    preconditioner: Solve,
    repeats: int,
    steps: Callable[[int], Callable[[Tensor], Tensor]] | None,
) -> float:
    """That of M (C_s + damping), the largest of a few samples, by power iteration."""
    largest = torch.finfo(lift.dtype).tiny
    for sample in range(1 if steps is None else SAMPLES):
        vector = operator.normal(1, seed=sample)
        vector /= vector.norm()
        for _ in range(POWERS):
            # a repeat that is not used otherwise starts with the same sample each time
            product = operator.product if steps is None else steps(repeats + sample)
            image = preconditioner(product(vector) + lift * vector)
            value = float(image.norm())
            if value == 0:
                break
            vector = image / value
            largest = max(largest, value)
    return largest
