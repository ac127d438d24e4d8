"""(C + damping)^-1 v for a symmetric operator C and many vectors v at once.

Every solver treats the blocks of its operator separately. Damping is one number, or one per block,
and is added to the eigenvalues of C.

Shapes: k vectors, P rows of C, B blocks.
"""

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from influence_kit.core.arguments import check_count, check_number, check_texts
from influence_kit.core.objects import check_functions, is_one_of
from influence_kit.core.scaling import balanced, times_powers
from influence_kit.errors import CurvatureError, NonFiniteError
from influence_kit.operators.block import Block
from influence_kit.operators.checks import check_blocks, check_square
from influence_kit.operators.damping_by_block import Damping, damping_by_block
from influence_kit.operators.indefinite import IndefiniteBlockError, indefinite
from influence_kit.operators.operator import Operator, check_operator, check_vectors
from influence_kit.operators.partition import dots, spread

Solve = Callable[[Tensor], Tensor]
Report = Callable[[Tensor, Tensor], object]
# rounds that would never end
MOST = 10**9
# an iteration that has grown by this factor will not converge
DIVERGED = 1e6


def refuse_non_finite_rows(vectors: Tensor) -> Tensor:
    """The right-hand sides ``[k, P]``, checked to be finite.

    Raises:
        NonFiniteError: with the index of the first that is not finite: an iteration might treat it
            as solved.
    """
    bad = torch.nonzero(~torch.isfinite(vectors).all(dim=1))[:, 0]
    if len(bad):
        raise NonFiniteError(
            f"vector {int(bad[0])} of {len(vectors)} to solve for is NaN or infinite"
        )
    return vectors


class Cholesky:
    """The exact inverse of damped blocks.

    Args:
        blocks: the blocks of C, each written out or as a ``Block``.
        damping: added to their eigenvalues.
        names: the names of the blocks in errors.

    Raises:
        InvalidArgumentError: for blocks that are not square matrices of finite floats.
        CurvatureError: if a damped block is singular or has negative eigenvalues; the message has
            their range.
    """

    def __init__(
        self,
        blocks: Sequence[Tensor | Block],
        damping: Damping,
        names: Sequence[str] | None = None,
    ) -> None:
        check_blocks(blocks, "blocks", "square matrices")
        values = damping_by_block(damping, len(blocks)).tolist()
        if names is None:
            names = [str(number) for number in range(len(blocks))]
        check_texts(names, "names", "names of the blocks", len(blocks))
        known = [
            block if isinstance(block, Block) else Block(check_square(block, f"blocks[{number}]"))
            for number, block in enumerate(blocks)
        ]
        self.sizes = [block.size for block in known]
        self.inverses = []
        for block, value, name in zip(known, values, names, strict=True):
            try:
                self.inverses.append(block.inverse(value))
            except IndefiniteBlockError as error:
                matrix = f"the curvature of block '{name}'"
                raise indefinite(error.eigenvalues, error.damping, matrix) from None

    def __call__(self, vectors: Tensor) -> Tensor:
        """(C + damping)^-1 v for each row v of ``[k, P]``."""
        refuse_non_finite_rows(check_vectors(vectors, sum(self.sizes)))
        parts = zip(self.inverses, vectors.double().split(self.sizes, dim=1), strict=True)
        return torch.cat([inverse(part) for inverse, part in parts], dim=1).to(vectors)


def conjugate_gradients(
    operator: Operator,
    vectors: Tensor,
    damping: Damping,
    max_iter: int = 100,
    tol: float = 1e-6,
    preconditioner: Solve | None = None,
    report: Report | None = None,
) -> Tensor:
    """(C + damping)^-1 v by conjugate gradients, for all rows at once (Martens 2010).

    A row is done when the norm of its residual is at most ``tol`` times that of v in each block;
    it is then left out. One product with C per iteration, none before the first.

    Args:
        operator: C.
        vectors: ``[k, P]``.
        damping: added to C.
        max_iter: the most iterations; rows that are not done by then cause a warning.
        tol: the relative residual.
        preconditioner: a cheap approximation of (C + damping)^-1, symmetric and positive definite.
            The first iterate is its solution, times the best factor.
        report: is called at the end with the number of iterations of each row and the relative
            residual reached, both ``[k]``.

    Raises:
        CurvatureError: if C + damping has a direction of negative curvature.
        NonFiniteError: for a row that is NaN or infinite.
        InvalidArgumentError: for an invalid ``max_iter`` or ``tol``.
    """
    check_vectors(vectors, check_operator(operator).size)
    check_functions({"preconditioner": preconditioner}, "preconditioner(vectors)")
    check_count(max_iter, "max_iter")
    check_number(tol, "tol", least=0, below=1)
    by_block = damping_by_block(damping, len(operator.sizes))
    vectors, powers = balanced(refuse_non_finite_rows(vectors))
    # a residual below rounding carries no information, and its directions vanish
    tol = max(tol, torch.finfo(vectors.dtype).eps)
    state = _Descent(operator, vectors, by_block, preconditioner)
    solution = torch.zeros_like(vectors)
    iterations = torch.zeros(len(vectors), dtype=torch.long, device=vectors.device)
    residuals = torch.zeros(len(vectors), dtype=torch.float64, device=vectors.device)
    for iteration in range(max_iter + 1):
        # written so that a NaN residual counts as not done
        left = state.relative()
        going = ~(left <= tol)
        keep = going.any(dim=1) if iteration < max_iter else going.new_zeros(len(going))
        if not bool(keep.all()):
            rows = state.rows[~keep]
            solution[rows], residuals[rows] = state.x[~keep], left[~keep].amax(dim=1)
            iterations[rows] = iteration
            state.leave(keep)
        if not len(state.rows):
            break
        # a block that is done does not change while another of its row continues
        state.step(going[keep])
    if report is not None:
        report(iterations, residuals)
    _warn_of_residuals(residuals, tol, max_iter)
    return times_powers(solution, powers)


def _warn_of_residuals(residuals: Tensor, tol: float, max_iter: int) -> None:
    unfinished = ~(residuals <= tol)
    if bool(unfinished.any()):
        warnings.warn(
            f"conjugate gradients stopped after {max_iter} iterations with relative residuals up "
            f"to {float(residuals.max()):.2g} (tol: {tol:.2g}) in {int(unfinished.sum())} of "
            f"{len(residuals)} rows: raise `max_iter` or the damping, or use a preconditioner",
            stacklevel=3,
        )


class _Descent:
    """The state of conjugate gradients, for the rows that are not done."""

    def __init__(
        self, operator: Operator, vectors: Tensor, damping: Tensor, preconditioner: Solve | None
    ) -> None:
        self.operator, self.sizes = operator, operator.sizes
        self.lift = spread(damping, operator.sizes).to(vectors)
        self.preconditioner = preconditioner
        self.rows = torch.arange(len(vectors), device=vectors.device)
        self.x, self.residual = torch.zeros_like(vectors), vectors.clone()
        # a zero row is done at once
        self.norms = dots(vectors, vectors, self.sizes).sqrt()
        self.z = self._conditioned()
        self.direction = self.z.clone()
        self.rz = dots(self.residual, self.z, self.sizes)

    def _conditioned(self) -> Tensor:
        return self.residual if self.preconditioner is None else self.preconditioner(self.residual)

    def relative(self) -> Tensor:
        """The norm of the residual over that of the right-hand side, ``[k, B]``."""
        norms = dots(self.residual, self.residual, self.sizes).sqrt()
        return torch.where(self.norms > 0, norms / self.norms, 0.0)

    def leave(self, keep: Tensor) -> None:
        """Continue with some of the rows."""
        for name in ("rows", "x", "residual", "direction", "norms", "rz"):
            setattr(self, name, getattr(self, name)[keep])

    def step(self, going: Tensor) -> None:
        """One iteration for the blocks that are not done; ``going`` is their mask ``[k, B]``."""
        image = self.operator.product(self.direction) + self.lift * self.direction
        bend = dots(self.direction, image, self.sizes)
        self._check(bend, going)
        alpha = spread(torch.where(going, self.rz / bend, 0.0), self.sizes).to(self.x)
        self.x = self.x + alpha * self.direction
        self.residual = self.residual - alpha * image
        self.z = self._conditioned()
        new = dots(self.residual, self.z, self.sizes)
        beta = spread(torch.where(going, new / self.rz, 0.0), self.sizes).to(self.x)
        self.direction, self.rz = self.z + beta * self.direction, new
        if bool((self.relative() > DIVERGED).any()):
            raise CurvatureError(
                "conjugate gradients diverge: the residual has grown by a factor of "
                f"{DIVERGED:.0e}; use float64 or a larger damping"
            )

    def _check(self, bend: Tensor, going: Tensor) -> None:
        squares = dots(self.direction, self.direction, self.sizes)
        if bool((going & ~(bend > 0)).any()):
            least = float((bend / squares)[going].min())
            raise CurvatureError(
                f"the damped curvature is {least:.4g} along a direction, so it is not positive "
                "definite and conjugate gradients do not apply: use curvature='ggn', which has no "
                "negative eigenvalues, or a larger damping"
            )


def lissa(
    operator: Operator,
    vectors: Tensor,
    damping: Damping,
    depth: int = 1000,
    repeats: int = 1,
    scale: float | str = "auto",
    steps: Callable[[int], Callable[[Tensor], Tensor]] | None = None,
    tol: float = 0.0,
) -> Tensor:
    """(C + damping)^-1 v by the Neumann series (LiSSA, arXiv 1602.03943).

    ``h <- v + h - (C_s h + damping h) / scale``; the result is ``h / scale``, averaged over
    repeats. The fixed point is (C + damping)^-1 v for any scale above the largest eigenvalue of
    C + damping. C_s is C, or with ``steps`` a sample of it.

    Args:
        operator: C.
        vectors: ``[k, P]``.
        damping: added to C.
        depth: the most iterations.
        repeats: how often to run, each time with other samples.
        scale: a number, or "auto": 1.1 times the largest damped eigenvalue by power iteration.
        steps: gives the product with C_s for a repeat, a new sample per call; None for C itself.
        tol: stop when no row moves by more than this, relatively (0: run all iterations).

    Raises:
        CurvatureError: if the series diverges.
        NonFiniteError: for a row that is NaN or infinite.
        InvalidArgumentError: for an invalid ``scale``, ``depth``, ``repeats`` or ``tol``.
    """
    check_vectors(vectors, check_operator(operator).size)
    check_functions({"steps": steps}, "steps(repeat)")
    check_count(depth, "depth", most=MOST)
    check_count(repeats, "repeats", most=MOST)
    check_number(tol, "tol", least=0, below=1)
    vectors, powers = balanced(refuse_non_finite_rows(vectors))
    by_block = damping_by_block(damping, len(operator.sizes))
    lift = spread(by_block, operator.sizes).to(vectors)
    if is_one_of(scale, ("auto",)):
        scale = 1.1 * (largest_eigenvalue(operator) + float(lift.max()))
    scale = check_number(scale, "scale", above=0, instead='"auto"')
    total = torch.zeros_like(vectors)
    limit = DIVERGED * vectors.norm(dim=1).clamp(min=torch.finfo(vectors.dtype).tiny)
    for repeat in range(repeats):
        product = operator.product if steps is None else steps(repeat)
        h = vectors.clone()
        for _ in range(depth):
            move = vectors - (product(h) + lift * h) / scale
            h = h + move
            norms = h.norm(dim=1)
            # a series that converges stays below |v| scale / (least damped eigenvalue)
            bound = limit * max(1.0, scale / max(float(lift.min()), 1e-30))
            if not bool((norms <= bound).all()):
                raise CurvatureError(
                    f"LiSSA diverges at scale {scale:.4g}: the scale must be above the largest "
                    "eigenvalue of curvature + damping (of every sample of it), and the curvature "
                    "must not be negative below -damping; use a larger `scale`, a larger damping, "
                    "a larger `hessian_batch_size`, or curvature='ggn'"
                )
            if tol and bool((move.norm(dim=1) <= tol * norms).all()):
                break
        total += h / scale
    return times_powers(total / repeats, powers)


def largest_eigenvalue(operator: Operator, iterations: int = 20, seed: int = 0) -> float:
    """The largest absolute eigenvalue, estimated from below by power iteration."""
    check_count(iterations, "iterations", most=MOST)
    vector = check_operator(operator).normal(1, seed)
    vector /= vector.norm()
    value = 0.0
    for _ in range(iterations):
        image = operator.product(vector)
        image, power = balanced(image)
        norm = float(image.norm())
        if norm == 0:
            return 0.0
        value = norm * 2.0 ** float(power)
        vector = image / norm
    return value
