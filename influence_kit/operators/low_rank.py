"""Inverses from a few eigenpairs of each block: Arnoldi (Lanczos) and Nystroem.

Shapes: k vectors, P rows, r eigenpairs, B blocks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from influence_kit.core.arguments import check_count, check_flag, check_number, shown
from influence_kit.errors import CurvatureError, InvalidArgumentError
from influence_kit.operators.checks import check_blocks, check_matrix
from influence_kit.operators.damping_by_block import Damping, damping_by_block
from influence_kit.operators.operator import Operator, check_operator, check_vectors
from influence_kit.operators.partition import spread


@dataclass(frozen=True)
class EigenPairs:
    """Eigenvectors of one block as columns ``[P, r]``, with their eigenvalues ``[r]``."""

    values: Tensor
    vectors: Tensor

    def __post_init__(self) -> None:
        rank = check_matrix(self.vectors, "vectors", "[P, r]").shape[1]
        values = self.values[None] if isinstance(self.values, Tensor) else self.values
        if check_matrix(values, "values", "[r]").shape[1] != rank:
            raise InvalidArgumentError(
                f"there are {values.shape[1]} eigenvalues and {rank} eigenvectors; pass one of "
                "each per pair, the vectors as columns [P, r]"
            )


def as_tensors(pairs: Sequence[EigenPairs]) -> dict[str, Tensor]:
    """The eigenpairs of all blocks as tensors by name, to save them."""
    found = {}
    for number, pair in enumerate(pairs):
        found[f"values.{number}"], found[f"vectors.{number}"] = pair.values, pair.vectors
    return found


def from_tensors(tensors: Mapping[str, Tensor], blocks: int) -> list[EigenPairs]:
    """The inverse of ``as_tensors``."""
    return [
        EigenPairs(tensors[f"values.{number}"], tensors[f"vectors.{number}"])
        for number in range(blocks)
    ]


class LowRank:
    """V (D + damping)^-1 V^T, and with ``complement`` + (I - V V^T) / damping (Woodbury).

    Args:
        pairs: the eigenpairs of each block.
        damping: added to the eigenvalues; must be positive with ``complement``.
        complement: whether directions outside V count, with eigenvalue 0.
    """

    def __init__(self, pairs: Sequence[EigenPairs], damping: Damping, complement: bool) -> None:
        for number, pair in enumerate(check_blocks(pairs, "pairs", "EigenPairs, of each block")):
            if not isinstance(pair, EigenPairs):
                raise InvalidArgumentError(
                    f"`pairs[{number}]` must be EigenPairs, as `arnoldi` and `nystrom` return "
                    f"them; got {shown(pair)}"
                )
        self.pairs, self.complement = pairs, check_flag(complement, "complement")
        self.damping = damping_by_block(damping, len(pairs), positive=complement)
        for number, (pair, value) in enumerate(zip(pairs, self.damping.tolist(), strict=True)):
            _check_positive(pair.values, value, number)

    def __call__(self, vectors: Tensor) -> Tensor:
        """The inverse times each row of ``[k, P]``."""
        sizes = [len(pair.vectors) for pair in self.pairs]
        check_vectors(vectors, sum(sizes))
        solved = []
        for pair, damping, part in zip(
            self.pairs, self.damping.tolist(), vectors.split(sizes, dim=1), strict=True
        ):
            weights = 1 / (pair.values + damping)
            if self.complement:
                weights = weights - 1 / damping
            basis = pair.vectors.to(part)
            inside = ((part @ basis) * weights.to(part)) @ basis.T
            solved.append(inside + part / damping if self.complement else inside)
        return torch.cat(solved, dim=1)


def _check_positive(values: Tensor, damping: float, number: int) -> None:
    """Refuse to divide by eigenvalues that are not positive."""
    if not len(values):
        return
    least, rounding = float(values.min()), len(values) * torch.finfo(values.dtype).eps
    if least + damping <= rounding * float(values.abs().max()):
        raise CurvatureError(
            f"block {number} is singular or indefinite: the least of {len(values)} eigenvalues is "
            f"{least:.4g}, and damping {damping:.4g} does not make it positive. Use a larger "
            "damping, or a curvature that is never negative (Gauss-Newton, Fisher)"
        )


def nystrom(operator: Operator, rank: int, seed: int = 0) -> list[EigenPairs]:
    """Eigenpairs of the randomized Nystroem approximation (arXiv 2110.02820).

    C_nys = (C O) (O^T C O)^+ (C O)^T with O an orthonormal basis of ``rank`` random directions:
    one product with C for all of them. It is exact if the rank of C is at most ``rank``.

    Raises:
        CurvatureError: if C is indefinite on the directions: the approximation requires a positive
            semi-definite C.
    """
    check_operator(operator)
    check_count(rank, "rank")
    ranks = [min(rank, size) for size in operator.sizes]
    probes = operator.normal(max(ranks), seed).double().split(operator.sizes, dim=1)
    bases = [
        torch.linalg.qr(probe[:r].T)[0] for probe, r in zip(probes, ranks, strict=True)
    ]  # [P, r] per block
    rows = torch.cat([_padded(basis.T, max(ranks)) for basis in bases], dim=1)
    images = operator.product(rows.to(operator.sample)).double().split(operator.sizes, dim=1)
    return [
        _nystrom_block(basis, image[:r].T, number, torch.finfo(operator.sample.dtype).eps)
        for number, (basis, image, r) in enumerate(zip(bases, images, ranks, strict=True))
    ]


def _padded(rows: Tensor, count: int) -> Tensor:
    return torch.cat([rows, rows.new_zeros(count - len(rows), rows.shape[1])])


def _nystrom_block(basis: Tensor, image: Tensor, number: int, eps: float) -> EigenPairs:
    core = basis.T @ image
    values, vectors = torch.linalg.eigh((core + core.T) / 2)
    largest = float(values.abs().max())
    if float(values[0]) < -(eps**0.5) * largest:
        raise CurvatureError(
            f"block {number} is indefinite (an eigenvalue of {float(values[0]):.4g} on the sampled "
            "directions), for which the Nystroem approximation does not hold: use curvature='ggn'"
        )
    keep = values > len(values) * eps * largest
    # C_nys = F F^T with F = C O U / sqrt(values)
    factor = image @ (vectors[:, keep] / values[keep].sqrt())
    left, singular, _ = torch.linalg.svd(factor, full_matrices=False)
    return EigenPairs(singular.square(), left)


def arnoldi(operator: Operator, steps: int, tol: float = 0.0, seed: int = 0) -> list[EigenPairs]:
    """Eigenpairs of the restriction of C to Krylov subspaces (arXiv 2112.03052).

    Lanczos with full reorthogonalisation from a random start, one product per step; the restriction
    is symmetric, so its eigenpairs are those of ``eigh``. A block stops when the orthogonal rest of
    an image, the next direction, is shorter than ``tol`` or lost in rounding.
    """
    check_operator(operator)
    check_count(steps, "steps")
    check_number(tol, "tol", least=0)
    start = operator.normal(1, seed).split(operator.sizes, dim=1)
    bases = [[part[0].double() / part.double().norm()] for part in start]
    images: list[list[Tensor]] = [[] for _ in bases]
    done = [False] * len(bases)
    for _ in range(min(steps, max(operator.sizes))):
        current = [
            torch.zeros_like(basis[0]) if over else basis[-1]
            for basis, over in zip(bases, done, strict=True)
        ]
        product = operator.product(torch.cat(current)[None].to(operator.sample))[0].double()
        for b, image in enumerate(product.split(operator.sizes)):
            if not done[b]:
                done[b] = not _extend(bases[b], images[b], image, tol)
        if all(done):
            break
    return [
        _restricted(basis[: len(image)], image) for basis, image in zip(bases, images, strict=True)
    ]


def _extend(basis: list[Tensor], images: list[Tensor], image: Tensor, tol: float) -> bool:
    """Store the image and orthogonalise it; returns whether there is a next direction."""
    images.append(image)
    known = torch.stack(basis, dim=1)
    left = image
    for _ in range(2):  # twice is enough for orthogonality to rounding
        left = left - known @ (known.T @ left)
    norm = float(left.norm())
    if len(basis) >= len(image) or norm <= max(tol, 1e-10 * float(image.norm())):
        return False
    basis.append(left / norm)
    return True


def _restricted(basis: list[Tensor], images: list[Tensor]) -> EigenPairs:
    known, image = torch.stack(basis, dim=1), torch.stack(images, dim=1)
    small = known.T @ image
    values, vectors = torch.linalg.eigh((small + small.T) / 2)
    return EigenPairs(values, known @ vectors)


class NystromPreconditioner:
    """(s_r + damping) U (S + damping)^-1 U^T + (I - U U^T), s_r the least eigenvalue found."""

    def __init__(self, operator: Operator, damping: Damping, rank: int, seed: int = 0) -> None:
        sizes = check_operator(operator).sizes
        self.damping = damping_by_block(damping, len(sizes), positive=True)
        self.pairs = nystrom(operator, rank, seed)

    def __call__(self, vectors: Tensor) -> Tensor:
        """The preconditioner times each row."""
        sizes = [len(pair.vectors) for pair in self.pairs]
        parts = check_vectors(vectors, sum(sizes)).split(sizes, dim=1)
        scaled = []
        for pair, damping, part in zip(self.pairs, self.damping.tolist(), parts, strict=True):
            least = float(pair.values.min()) if len(pair.values) else 0.0
            weights = (least + damping) / (pair.values + damping) - 1
            basis = pair.vectors.to(part)
            scaled.append(part + ((part @ basis) * weights.to(part)) @ basis.T)
        return torch.cat(scaled, dim=1)


class JacobiPreconditioner:
    """(diagonal of C + damping)^-1, the diagonal estimated by probes if it is not known."""

    def __init__(self, operator: Operator, damping: Damping, seed: int = 0) -> None:
        check_operator(operator)
        values = damping_by_block(damping, len(operator.sizes), positive=True)
        lift = spread(values, operator.sizes).to(operator.sample.device)
        # an estimate may be negative although the diagonal is not
        self.inverse = 1 / (operator.diagonal(seed).clamp(min=0) + lift)

    def __call__(self, vectors: Tensor) -> Tensor:
        """The preconditioner times each row."""
        return check_vectors(vectors, len(self.inverse)) * self.inverse.to(vectors)
