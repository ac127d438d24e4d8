"""The sparse transform against its matrix, and against what theory says of inner products."""

import math

import pytest
import torch
from matrices import normal
from torch import Tensor

from influence_kit.core.draws import key_of
from influence_kit.projections import sjlt
from influence_kit.projections.maps import VectorMap
from influence_kit.projections.random_maps import random_map
from influence_kit.projections.sjlt import SJLT

DOUBLE = torch.zeros((), dtype=torch.float64)
# rows, columns, k: vectors, several rows a run and one, rows that are longer than an image
SIZES = [
    (1, 50, 7),
    (1, 3, 8),
    (5, 3, 16),
    (6, 20, 8),
    (7, 4, 10),
    (30, 9, 4),
    (3, 3, 9),
    (12, 12, 12),
    (4, 5, 1),
    (1, 1, 1),
]
every_size = pytest.mark.parametrize(("rows", "columns", "k"), SIZES)


def make(rows: int, columns: int, k: int, seed: int = 0) -> SJLT:
    return SJLT(rows, columns, k, key_of(seed))


def outer(left: Tensor, right: Tensor) -> Tensor:
    """Sums of outer products ``[n, r * c]``, written out."""
    return torch.einsum("ntr,ntc->nrc", left, right).flatten(1)


@every_size
def test_each_entry_is_added_to_one_place_with_a_sign(rows: int, columns: int, k: int) -> None:
    found = make(rows, columns, k)
    matrix = found(torch.eye(rows * columns, dtype=torch.float64))
    ones = torch.ones(rows * columns).double()
    assert torch.equal(matrix.abs().sum(1), ones)
    assert torch.equal(matrix.abs().max(1).values, ones)
    assert torch.equal(found.matrix(DOUBLE), matrix)
    places = torch.tensor([rows * columns - 1, 0, 0])
    assert torch.equal(found.rows(places, DOUBLE), matrix[places])


@every_size
@pytest.mark.parametrize("positions", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_need_not_be_formed(
    rows: int, columns: int, k: int, positions: int, dtype: torch.dtype
) -> None:
    """By every way the image of a sum of outer products is that of the matrix written out."""
    found, accuracy = make(rows, columns, k), 1e-12 if dtype == torch.float64 else 1e-4
    left = normal(4, positions, rows).to(dtype)
    right = normal(4, positions, columns, seed=1).to(dtype)
    expected = outer(left, right) @ found.matrix(left)
    row_signs, signs = found._signs_at(left)
    ways = [
        VectorMap.of_outer(found, left, right),
        found.of_outer(left, right),
        found._formed(left * row_signs, right * signs),
        found._convolved(left * row_signs, right * signs),
    ]
    for image in ways:
        assert image.dtype == dtype
        assert torch.allclose(image, expected, rtol=accuracy, atol=accuracy)


@pytest.mark.parametrize("kind", ["gaussian", "rademacher", "orthogonal", "mask", "identity"])
def test_products_under_the_other_maps(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found, left, right = random_map(kind, 12, 5, 0), normal(5, 2, 3), normal(5, 2, 4, seed=1)
    monkeypatch.setattr("influence_kit.projections.maps.workspace_bytes", lambda device: 2 * 2 * 96)
    expected = outer(left, right) @ found.matrix(DOUBLE)
    assert torch.allclose(found.of_outer(left, right), expected, rtol=1e-12, atol=1e-12)


def test_few_products_of_long_vectors_are_convolved(monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix of 10^10 entries could not be formed."""
    size = 100_000
    found, left, right = make(size, size, 64), torch.zeros(3, 1, size), torch.zeros(3, 1, size)
    places = torch.tensor([0, 123_456_789, size * size - 1])
    left[torch.arange(3), 0, places // size] = 2.0
    right[torch.arange(3), 0, places % size] = -1.5
    monkeypatch.setattr(sjlt, "workspace_bytes", lambda device: 2 * 4 * 64 * 4)  # in two parts
    expected = -3 * found.rows(places, torch.zeros(()))
    assert torch.allclose(found.of_outer(left, right), expected, atol=1e-5)


def test_many_products_are_formed() -> None:
    """With transforms of all positions to many entries: slower, and 500 times the memory."""
    assert not make(10, 10, 4096)._is_convolved(torch.zeros(1, 8, 10))
    assert not make(128, 128, 4096)._is_convolved(torch.zeros(1, 64, 128))
    assert make(512, 784, 512)._is_convolved(torch.zeros(1, 1, 512))


def test_products_for_a_map_of_vectors() -> None:
    found, left, right = make(1, 12, 5), normal(2, 3, 4), normal(2, 3, 3, seed=1)
    expected = outer(left, right) @ found.matrix(DOUBLE)
    assert torch.allclose(found.of_outer(left, right), expected, rtol=1e-12, atol=1e-12)


def test_half_precision_is_convolved_in_single() -> None:
    found, left, right = make(9, 11, 6), normal(2, 1, 9), normal(2, 1, 11, seed=1)
    row_signs, signs = found._signs_at(left.bfloat16())
    image = found._convolved(left.bfloat16() * row_signs, right.bfloat16() * signs)
    assert image.dtype == torch.bfloat16
    expected = outer(left, right) @ found.matrix(DOUBLE)
    assert torch.allclose(image.double(), expected, rtol=0.05, atol=0.1)


def test_places_and_signs_are_fair() -> None:
    drawn = torch.stack([make(3, 5, 4, seed).matrix(DOUBLE) for seed in range(2000)])
    assert (drawn.abs().mean(0) - 0.25).abs().max() < 5 * math.sqrt(3 / 16 / 2000)
    assert drawn.mean(0).abs().max() < 5 * math.sqrt(0.25 / 2000)
    # two entries, neither in a row: together once in k times, with unrelated signs
    for first, second in ((0, 5), (1, 12), (0, 4)):
        products = (drawn[:, first] * drawn[:, second]).sum(1)
        assert abs(products.abs().mean() - 0.25) < 5 * math.sqrt(3 / 16 / 2000)
        assert abs(products.mean()) < 5 * math.sqrt(0.25 / 2000)


def test_entries_that_follow_one_another_never_meet() -> None:
    together = [
        *make(1, 12, 4).matrix(DOUBLE).split(4),  # parts of a vector
        *make(6, 2, 4).matrix(DOUBLE).split(4),  # runs of two rows
    ]
    for block in together:
        assert torch.equal(block @ block.T, torch.eye(4, dtype=torch.float64))


@pytest.mark.parametrize(
    ("rows", "columns"), [(12, 10), (10, 60), (1, 120)], ids=["short rows", "long rows", "vectors"]
)
@pytest.mark.parametrize("rank", [1, 12])
def test_inner_products_vary_within_the_bound(rows: int, columns: int, rank: int) -> None:
    """500 pairs, a map of its own for each; for rank one the last terms of the bound count."""
    pairs, k = 500, 32
    x = torch.bmm(normal(pairs, rows, rank), normal(pairs, rank, columns, seed=1))
    y = 0.6 * x + torch.bmm(normal(pairs, rows, rank, seed=2), normal(pairs, rank, columns, seed=3))
    exact = (x * y).sum((1, 2))
    square = x.square().sum((1, 2)) * y.square().sum((1, 2)) + exact.square()
    square += 2 * torch.bmm(x, y.transpose(1, 2)).square().sum((1, 2))
    square += 2 * torch.bmm(x.transpose(1, 2), y).square().sum((1, 2))
    maps = [make(rows, columns, k, seed) for seed in range(pairs)]
    images = [(m(a.flatten()), m(b.flatten())) for m, a, b in zip(maps, x, y, strict=True)]
    z = (torch.stack([a @ b for a, b in images]) - exact) / (square / k).sqrt()
    assert abs(z.mean()) < 5 * z.std() / math.sqrt(pairs)
    assert z.square().mean() < 1 + 5 * z.square().std() / math.sqrt(pairs)
    assert z.square().mean() > 0.1, "not less of an error than a random map must have"
