"""Random maps against their matrices, and against what theory says of inner products."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from matrices import normal
from torch import Tensor

from influence_kit.errors import InvalidArgumentError
from influence_kit.projections import random_maps
from influence_kit.projections.maps import Composed, Coordinates, Identity, Placed, VectorMap
from influence_kit.projections.random_maps import (
    KINDS,
    DenseMap,
    Orthogonal,
    random_map,
    shortened,
)
from influence_kit.projections.sjlt import SJLT

DOUBLE, SINGLE = torch.zeros((), dtype=torch.float64), torch.zeros(())
# more entries than places and fewer, multiples and not, one of each
SIZES = [(7, 3), (12, 4), (5, 5), (3, 8), (1, 1), (9, 1), (1, 4), (50, 16)]
DRAWN = [kind for kind in KINDS if kind != "identity"]
DENSE = ["gaussian", "rademacher"]

every_kind = pytest.mark.parametrize("kind", KINDS)
drawn = pytest.mark.parametrize("kind", DRAWN)
every_size = pytest.mark.parametrize(("p", "k"), SIZES)


def make(kind: str, p: int, k: int, seed: int = 0, name: str = "w") -> VectorMap:
    return random_map(kind, p, k, seed, name)


def written(kind: str, p: int, k: int, seed: int = 0, name: str = "w") -> Tensor:
    return make(kind, p, k, seed, name).matrix(DOUBLE)


def entries(kind: str, p: int, k: int) -> int:
    """How many entries an image has."""
    return {"identity": p, "mask": min(k, p), "orthogonal": min(k, p)}.get(kind, k)


# A map is its matrix.


@every_kind
@every_size
def test_a_map_is_its_matrix(kind: str, p: int, k: int) -> None:
    found = make(kind, p, k)
    matrix = found(torch.eye(p, dtype=torch.float64))
    assert matrix.shape == (p, entries(kind, p, k))
    assert (found.p, found.k) == (p, entries(kind, p, k))
    assert torch.equal(found.matrix(DOUBLE), matrix)
    places = torch.randint(0, p, (2 * p + 1,), generator=torch.Generator().manual_seed(1))
    assert torch.equal(found.rows(places, DOUBLE), matrix[places])
    assert found.rows(places[:0], DOUBLE).shape == (0, matrix.shape[1])
    for shape in ((p,), (1, p), (5, p), (2, 3, p)):
        values = normal(*shape)
        before = values.clone()
        assert torch.allclose(found(values), values @ matrix, rtol=1e-12, atol=1e-13)
        assert torch.equal(values, before), "the vectors came back changed"


@every_kind
def test_images_do_not_depend_on_the_batch(kind: str) -> None:
    """Nor on how the vectors lie in memory."""
    found, values = make(kind, 23, 5), normal(11, 23)
    whole = found(values)
    for size in (1, 4, 10):
        parts = torch.cat([found(part) for part in values.split(size)])
        assert torch.allclose(parts, whole, rtol=1e-12, atol=1e-13)
    strided = values.T.contiguous().T
    assert torch.allclose(found(strided), whole, rtol=1e-12, atol=1e-13)


@every_size
def test_the_identity_changes_nothing(p: int, k: int) -> None:
    assert torch.equal(written("identity", p, k), torch.eye(p, dtype=torch.float64))
    values = normal(3, p)
    assert random_map("identity", p, k)(values) is values


@every_kind
@every_size
def test_what_is_short_already_stays(kind: str, p: int, k: int) -> None:
    found = shortened(kind, p, k, 0, "w")
    if p <= k:
        assert isinstance(found, Identity)
        assert found.p == p
    else:
        assert torch.equal(found.matrix(DOUBLE), written(kind, p, k))


def test_placed_vectors_lie_side_by_side() -> None:
    first, second = Placed(3, 5, 0), Placed(2, 5, 3)
    x, y = normal(4, 3), normal(4, 2, seed=1)
    assert torch.equal(first(x) + second(y), torch.cat([x, y], dim=1))
    eye = torch.eye(5, dtype=torch.float64)
    assert torch.equal(torch.cat([first.matrix(DOUBLE), second.matrix(DOUBLE)]), eye)
    assert torch.equal(second.rows(torch.tensor([1, 0, 1]), DOUBLE), eye[[4, 3, 4]])


@pytest.mark.parametrize("first", ["mask", "gaussian", "sjlt", "orthogonal"])
@pytest.mark.parametrize("second", ["sjlt", "rademacher", "identity"])
def test_one_map_after_the_other(first: str, second: str) -> None:
    one, two = make(first, 9, 6), make(second, 6, 4)
    both = Composed(one, two)
    expected = one.matrix(DOUBLE) @ two.matrix(DOUBLE)
    assert (both.p, both.k) == expected.shape
    assert torch.allclose(both.matrix(DOUBLE), expected, rtol=1e-12, atol=1e-13)
    values = normal(2, 4, 9)
    assert torch.allclose(both(values), values @ expected, rtol=1e-12, atol=1e-13)
    places = torch.tensor([8, 0, 8])
    assert torch.allclose(both.rows(places, DOUBLE), expected[places], rtol=1e-12, atol=1e-13)


# What each kind is.


def test_a_gaussian_matrix_has_normal_entries_of_variance_one_over_k() -> None:
    entries = written("gaussian", 400, 50).flatten() * math.sqrt(50)
    count = len(entries)
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        # five standard errors: a chance of 6e-7 each
        error = 5 * math.sqrt(spread / count)
        assert abs(entries.pow(power).mean().item() - moment) < error, power


@every_size
def test_a_rademacher_matrix_has_signs(p: int, k: int) -> None:
    size = torch.full((p, k), k**-0.5, dtype=torch.float64)
    assert torch.equal(written("rademacher", p, k).abs(), size)


def test_rademacher_signs_are_fair_and_unrelated() -> None:
    signs = written("rademacher", 300, 40).sign()
    assert abs(signs.mean()) < 5 / math.sqrt(signs.numel())
    between = signs.T @ signs / 300
    between.fill_diagonal_(0)
    # 780 pairs of columns: the largest of as many normal numbers is above 6 with a chance of 2e-6
    assert between.abs().max() < 6 / math.sqrt(300)


@every_size
def test_orthogonal_columns(p: int, k: int) -> None:
    matrix, k = written("orthogonal", p, k), min(k, p)
    eye = torch.eye(k, dtype=torch.float64)
    assert torch.allclose(matrix.T @ matrix, eye * p / k, rtol=1e-12, atol=1e-12)


def test_orthogonal_columns_take_every_direction_alike() -> None:
    """A square one is uniform over all rotations and reflections: each entry has variance 1 / p."""
    entries = torch.stack([written("orthogonal", 3, 3, seed) for seed in range(2000)])
    assert entries.mean(0).abs().max() < 5 / math.sqrt(3 * 2000)
    # the variance of a squared entry of a direction in three dimensions is 4 / 45
    assert (entries.square().mean(0) - 1 / 3).abs().max() < 5 * math.sqrt(4 / 45 / 2000)
    assert abs(torch.linalg.det(entries).mean()) < 5 / math.sqrt(2000)


@every_size
def test_a_mask_takes_entries_and_scales_them(p: int, k: int) -> None:
    matrix, k = written("mask", p, k), min(k, p)
    scale = torch.full((k,), math.sqrt(p / k), dtype=torch.float64)
    assert torch.equal(matrix.sum(0), scale)
    assert torch.equal(matrix.max(0).values, scale)
    chosen = matrix.argmax(0)
    assert bool((chosen.diff() > 0).all()), "ascending, none twice"


def test_a_mask_takes_all_entries_equally_often() -> None:
    taken = torch.stack([written("mask", 10, 4, seed).sum(1) > 0 for seed in range(1000)])
    assert (taken.double().mean(0) - 0.4).abs().max() < 5 * math.sqrt(0.24 / 1000)


def test_a_mask_that_is_given() -> None:
    mask = Coordinates(6, torch.tensor([1, 2, 5]), scale=3.0)
    values = normal(2, 6)
    assert torch.equal(mask(values), 3 * values[:, [1, 2, 5]])
    assert torch.equal(Coordinates(6, torch.tensor([4]))(values), values[:, [4]])


# The same for any batch, precision, block; another for another seed, name, kind.


@every_kind
@every_size
def test_single_precision_has_the_same_map_rounded(kind: str, p: int, k: int) -> None:
    exact = written(kind, p, k)
    rounded = make(kind, p, k).matrix(SINGLE)
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, exact.float())
    # one object in turn for a model of each
    found = make(kind, p, k)
    assert torch.equal(found(torch.eye(p)), exact.float())
    assert torch.equal(found(torch.eye(p).double()), exact)
    assert torch.equal(found.rows(torch.arange(p), SINGLE), exact.float())
    assert torch.equal(found.matrix(DOUBLE), exact)


@drawn
def test_a_seed_and_a_name_are_a_map(kind: str) -> None:
    first = written(kind, 40, 8)
    assert torch.equal(first, written(kind, 40, 8))
    others = [
        written(kind, 40, 8, seed=1),
        written(kind, 40, 8, name="v"),
        random_map(kind, 40, 8, 0, "w", "inputs").matrix(DOUBLE),
        random_map(kind, 40, 8, "w", 0).matrix(DOUBLE),
    ]
    for place, other in enumerate(others):
        assert not torch.equal(first, other)
        assert not any(torch.equal(other, third) for third in others[:place])


def test_kinds_are_drawn_apart() -> None:
    """The signs of a Gaussian map are not those of a Rademacher map of the same seed."""
    same = written("gaussian", 100, 20).sign() == written("rademacher", 100, 20).sign()
    assert abs(same.double().mean() - 0.5) < 5 * math.sqrt(0.25 / 2000)


@pytest.mark.parametrize("kind", DENSE)
def test_maps_that_are_kept_are_those_that_are_drawn_again(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    p, k = 37, 5
    drawn: list[int] = []
    draw = DenseMap._drawn

    def counted(self: DenseMap, number: int, like: Tensor) -> Tensor:
        drawn.append(number)
        return draw(self, number, like)

    monkeypatch.setattr(DenseMap, "_drawn", counted)
    monkeypatch.setattr(random_maps, "BLOCK_BYTES", 4 * k * 7)
    kept, values = make(kind, p, k), normal(3, p)
    blocks = list(range(-(-p // 7)))
    first = kept(values)
    assert torch.equal(kept(values), first)
    assert drawn == blocks, "drawn once"
    matrix = kept.matrix(DOUBLE)
    assert drawn == blocks
    monkeypatch.setattr(random_maps, "KEPT_BYTES", 0)
    drawn.clear()
    again = make(kind, p, k)
    assert torch.equal(again(values), first)
    assert torch.equal(again.matrix(DOUBLE), matrix)
    assert drawn == [*blocks, *blocks], "drawn at each use"


@pytest.mark.parametrize("kind", DENSE)
@pytest.mark.parametrize("rows", [1, 2, 5, 36, 37, 1000])
def test_blocks_of_any_size(kind: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is drawn from a key of its own, so that none depends on the others."""
    p, k = 37, 48
    monkeypatch.setattr(random_maps, "BLOCK_BYTES", 4 * k * rows)
    found = make(kind, p, k)
    assert isinstance(found, DenseMap)
    numbers = range(-(-p // rows))
    last_first = [found._drawn(number, DOUBLE) for number in reversed(numbers)]
    matrix = torch.cat(last_first[::-1])
    assert matrix.shape == (p, k)
    assert torch.equal(found.matrix(DOUBLE), matrix)
    assert torch.allclose(found(normal(4, p)), normal(4, p) @ matrix, rtol=1e-12, atol=1e-13)
    assert not torch.equal(last_first[0][:1], last_first[-1][:1]) or len(numbers) == 1


def test_a_place_of_wide_images_is_a_block() -> None:
    """Also where one row is more than a block may take."""
    wide = DenseMap(3, random_maps.BLOCK_BYTES, 0, signs=True)
    assert wide.step == 1


@every_kind
def test_the_global_random_state_stays(kind: str) -> None:
    states = torch.get_rng_state(), np.random.get_state()[1]  # noqa: NPY002 - looked at alone
    written(kind, 30, 7)
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])  # noqa: NPY002


# Inner products.


@drawn
def test_inner_products_are_kept_on_average(kind: str) -> None:
    """E[M M^T] = I, entry by entry."""
    seeds, eye = 600, torch.eye(7, dtype=torch.float64)
    products = torch.stack([m @ m.T for m in (written(kind, 7, 3, s) for s in range(seeds))])
    error = products.std(0) / math.sqrt(seeds)
    # 28 entries, each 5 standard errors off with a chance of 6e-7
    assert bool(((products.mean(0) - eye).abs() <= 5 * error + 1e-12).all())


@pytest.mark.parametrize("kind", [*DENSE, "sjlt", "orthogonal"])
def test_inner_products_vary_as_theory_says(kind: str) -> None:
    """1,000 random pairs, a map of its own for each.

    The variance is (|x|^2 |y|^2 + <x, y>^2) / k for Gaussian maps, and that is a bound for the
    others. So z = error / standard deviation has mean 0 and mean square 1 (at most 1), and by
    Chebyshev at most one pair in 16 is beyond 4 standard deviations: in 1,000 pairs more than 101
    (62.5 and five standard deviations of that count) would have a chance of 3e-7.
    """
    pairs, p, k = 1000, 120, 32
    x, noise = normal(pairs, p), normal(pairs, p, seed=1)
    y = 0.6 * x + noise
    exact = (x * y).sum(1)
    images = [(m(x[i]), m(y[i])) for i, m in ((i, make(kind, p, k, i)) for i in range(pairs))]
    found = torch.stack([left @ right for left, right in images])
    z = (found - exact) / ((x.square().sum(1) * y.square().sum(1) + exact.square()) / k).sqrt()
    assert abs(z.mean()) < 5 * z.std() / math.sqrt(pairs)
    square, error = z.square().mean(), z.square().std() / math.sqrt(pairs)
    assert square < 1 + 5 * error
    if kind == "gaussian":
        assert square > 1 - 5 * error
    assert (z.abs() > 4).sum() <= 101
    assert square > 0.4, "not less of an error than a random map must have"


@pytest.mark.parametrize("kind", DENSE)
def test_one_map_keeps_a_thousand_inner_products(kind: str) -> None:
    """The Johnson-Lindenstrauss bound for one map and 1,000 pairs of unit vectors at once.

    |Mz|^2 is off |z|^2 by more than eps |z|^2 with a chance below 2 exp(-k (eps^2/4 - eps^3/6))
    (Dasgupta and Gupta 2003; Achlioptas 2003). <Mx, My> is a quarter of |M(x+y)|^2 - |M(x-y)|^2, so
    it is off by at most eps but for two such chances a pair.
    """
    pairs, p, k, chance = 1000, 300, 2048, 1e-3
    eps = _least(lambda e: 4 * pairs * math.exp(-k * (e**2 / 4 - e**3 / 6)) < chance)
    assert eps < 0.2
    x, y = (torch.nn.functional.normalize(normal(pairs, p, seed=s)) for s in (0, 1))
    found = make(kind, p, k)
    error = ((found(x) * found(y)).sum(1) - (x * y).sum(1)).abs().max()
    assert error < eps
    assert error > 1 / math.sqrt(k), "not less than one standard deviation"


def _least(holds: Callable[[float], bool]) -> float:
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


# Mistakes.


@pytest.mark.parametrize("kind", ["normal", "", None, 3])
def test_a_kind_that_there_is_not(kind: str) -> None:
    kinds = "gaussian, rademacher, orthogonal, sjlt, mask, identity"
    with pytest.raises(InvalidArgumentError, match=f"must be one of {kinds}; got {kind!r}"):
        random_map(kind, 4, 2, 0)


def test_the_kinds() -> None:
    found = {kind: type(make(kind, 4, 2)) for kind in KINDS}
    assert found == {
        "gaussian": DenseMap,
        "rademacher": DenseMap,
        "orthogonal": Orthogonal,
        "sjlt": SJLT,
        "mask": Coordinates,
        "identity": Identity,
    }
