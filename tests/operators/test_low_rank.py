"""Inverses from a few eigenpairs: Arnoldi and Nystroem against dense matrices."""

from typing import Any

import pytest
import torch
from contract import assert_close
from matrices import Matrix, normal, symmetric
from torch import Tensor

from influence_kit.errors import CurvatureError, InvalidArgumentError
from influence_kit.operators import Cholesky, EigenPairs, LowRank, arnoldi, nystrom
from influence_kit.operators.low_rank import as_tensors, from_tensors

P = 10
SPECTRUM = torch.linspace(3, 0.1, P).tolist()


def written_out(pair: EigenPairs) -> Tensor:
    return (pair.vectors * pair.values) @ pair.vectors.T


def assert_orthonormal(vectors: Tensor) -> None:
    assert_close(vectors.T @ vectors, torch.eye(vectors.shape[1]).double())


# Nystroem.


@pytest.mark.parametrize("rank", [3, 5, P, 50])
def test_nystrom_recovers_a_matrix_of_at_most_its_rank(rank: int) -> None:
    block = symmetric([4.0, 1.0, 0.01] + [0.0] * (P - 3))
    operator = Matrix(block)
    (pair,) = nystrom(operator, rank)
    assert operator.widths == [min(rank, P)], "one product for all directions"
    assert_close(written_out(pair), block, 1e-9)
    assert_orthonormal(pair.vectors)
    assert_close(pair.values[:3].sort(descending=True)[0], torch.tensor([4.0, 1.0, 0.01]).double())


def test_nystrom_of_a_low_rank_is_the_formula() -> None:
    """C O (O^T C O)^-1 (C O)^T, which any basis of the same directions gives."""
    operator, rank = Matrix(symmetric(SPECTRUM)), 4
    probes, (block,) = operator.normal(rank, 7).T, operator.blocks
    (pair,) = nystrom(operator, rank, seed=7)
    image = block @ probes
    expected = image @ torch.linalg.inv(probes.T @ image) @ image.T
    assert len(pair.values) == rank
    assert_close(written_out(pair), expected, 1e-9)
    assert not torch.allclose(written_out(nystrom(operator, rank, seed=8)[0]), expected)


def test_nystrom_of_blocks() -> None:
    """A block that is smaller than the rank takes all its directions."""
    blocks = symmetric([2.0, 1.0]), symmetric(SPECTRUM, 1), symmetric([3.0] + [0.0] * 5, 2)
    operator = Matrix(*blocks)
    pairs = nystrom(operator, 6)
    assert operator.products == 1
    assert_close(written_out(pairs[0]), blocks[0], 1e-9)
    assert len(pairs[1].values) == 6
    assert_close(written_out(pairs[2]), blocks[2], 1e-9)


def test_nystrom_of_an_indefinite_matrix_is_refused() -> None:
    operator = Matrix(symmetric([2.0, 1.0]), symmetric([3.0, -1.0], 1))
    match = r"block 1 is indefinite \(an eigenvalue of -1 on the sampled directions\)"
    with pytest.raises(CurvatureError, match=match):
        nystrom(operator, 2)


def test_nystrom_of_zero_leaves_the_damping() -> None:
    operator, vectors = Matrix(torch.zeros(3, 3).double()), normal(2, 3)
    found = LowRank(nystrom(operator, 2), 0.5, complement=True)(vectors)
    assert_close(found, 2 * vectors)


@pytest.mark.parametrize("rank", [0, -1, 2.0, True, "all"])
def test_a_rank_that_is_no_count_is_refused(rank: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="`rank` must be a positive int; got"):
        nystrom(Matrix(symmetric(SPECTRUM)), rank)


@pytest.mark.parametrize("make", [nystrom, arnoldi])
def test_the_full_rank_gives_the_explicit_inverse(make: Any) -> None:
    operator = Matrix(symmetric(SPECTRUM), symmetric([5.0, 1.0, 0.2], 1))
    vectors, damping = normal(7, P + 3), [0.3, 0.7]
    found = LowRank(make(operator, P), damping, complement=make is nystrom)(vectors)
    assert_close(found, Cholesky(operator.dense(), damping)(vectors), 1e-9)


# Arnoldi.


def test_arnoldi_of_some_steps_restricts_the_matrix_to_the_krylov_subspace() -> None:
    operator, steps = Matrix(symmetric([*SPECTRUM[:-2], -1.0, -2.0])), 4
    (block,) = operator.blocks
    (pair,) = arnoldi(operator, steps, seed=5)
    assert operator.widths == [1] * steps
    powers = [operator.normal(1, 5)[0]]
    for _ in range(steps - 1):
        powers.append(block @ powers[-1])
    basis = torch.linalg.qr(torch.stack(powers, dim=1))[0]
    assert_close(written_out(pair), basis @ (basis.T @ block @ basis) @ basis.T, 1e-8)
    assert_orthonormal(pair.vectors)


@pytest.mark.parametrize("steps", [3, 4, 200])
def test_arnoldi_stops_where_the_subspace_is_whole(steps: int) -> None:
    """Three eigenvalues: the third image is in the span of what is there."""
    operator = Matrix(symmetric([2.0] * 4 + [1.0] * 3 + [0.5] * 3))
    (pair,) = arnoldi(operator, steps)
    assert operator.products == 3
    assert_close(pair.values, torch.tensor([0.5, 1.0, 2.0]).double(), 1e-9)


def test_arnoldi_stops_at_its_tolerance() -> None:
    block = symmetric([2.0, *[1.0] * 8, 0.999])
    assert len(arnoldi(Matrix(block), P)[0].values) == 3
    assert len(arnoldi(Matrix(block), P, tol=0.01)[0].values) == 2


def test_arnoldi_of_blocks_that_end_apart() -> None:
    blocks = symmetric([2.0] * 3), symmetric(SPECTRUM, 1), torch.zeros(2, 2).double()
    operator = Matrix(*blocks)
    pairs = arnoldi(operator, P)
    assert [len(pair.values) for pair in pairs] == [1, P, 1]
    assert operator.products == P
    assert_close(written_out(pairs[1]), blocks[1], 1e-9)
    assert float(pairs[0].values) == pytest.approx(2.0)
    assert float(pairs[2].values) == 0.0


def test_the_start_is_drawn_by_the_seed() -> None:
    operator = Matrix(symmetric(SPECTRUM))
    one, same, other = (arnoldi(operator, 3, seed=seed)[0] for seed in (0, 0, 1))
    assert torch.equal(one.vectors, same.vectors)
    assert not torch.allclose(written_out(one), written_out(other))


# Their inverses.


def test_the_inverse_of_eigenpairs_with_and_without_the_rest() -> None:
    block = symmetric(SPECTRUM)
    values, vectors = torch.linalg.eigh(block)
    kept, lost = vectors[:, 4:], vectors[:, :4]
    pair, v = EigenPairs(values[4:], kept), normal(3, P)
    inside = v @ (kept / (values[4:] + 0.2)) @ kept.T
    assert_close(LowRank([pair], 0.2, complement=False)(v), inside)
    assert_close(LowRank([pair], 0.2, complement=True)(v), inside + v @ lost @ lost.T / 0.2)


def test_the_rest_wants_a_positive_damping() -> None:
    pair = EigenPairs(torch.ones(1).double(), torch.eye(3)[:, :1].double())
    with pytest.raises(InvalidArgumentError, match="damping must be positive here"):
        LowRank([pair], 0.0, complement=True)


@pytest.mark.parametrize(
    ("values", "damping"), [([1.0, 0.0], 0.0), ([1.0, -0.5], 0.5), ([1.0, -0.5], 0.1)]
)
def test_eigenvalues_that_the_damping_does_not_make_positive_are_refused(
    values: list[float], damping: float
) -> None:
    pair = EigenPairs(torch.tensor(values).double(), torch.eye(3)[:, :2].double())
    with pytest.raises(CurvatureError, match=r"singular|negative"):
        LowRank([pair], damping, complement=False)(normal(2, 3))


def test_eigenpairs_are_kept_by_name() -> None:
    pairs = nystrom(Matrix(symmetric(SPECTRUM), symmetric([1.0, 2.0])), 3)
    back = from_tensors(as_tensors(pairs), 2)
    for pair, other in zip(pairs, back, strict=True):
        assert torch.equal(pair.values, other.values)
        assert torch.equal(pair.vectors, other.vectors)
