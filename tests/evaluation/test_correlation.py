"""Correlations row by row, against scipy."""

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, rankdata, spearmanr

from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation.arrays import numbers, places, subset_masks
from influence_kit.evaluation.correlation import (
    RowCorrelation,
    check_truth,
    is_constant,
    pearson,
    ranks,
    spearman,
)


def rows_of(seed, kind):
    """Two matrices of 7 rows: of real numbers, or of few whole ones, so that most are tied."""
    random = np.random.default_rng(seed)
    shape = 7, int(random.integers(3, 40))
    sides = [random.normal(size=shape) for _ in range(2)]
    if kind == "ties":
        sides = [np.round(side) for side in sides]
        for side in sides:
            side[:, :2] = [-9, 9]  # no row is constant
    return sides


@pytest.mark.parametrize("kind", ["real", "ties"])
@pytest.mark.parametrize("seed", range(5))
def test_correlations_are_those_of_scipy(seed, kind):
    left, right = rows_of(seed, kind)
    np.testing.assert_array_equal(ranks(torch.tensor(left)), rankdata(left, axis=1))
    sides = torch.tensor(left), torch.tensor(right)
    expected = [spearmanr(one, other).statistic for one, other in zip(left, right, strict=True)]
    np.testing.assert_allclose(spearman(*sides), expected, atol=1e-14)
    expected = [pearsonr(one, other).statistic for one, other in zip(left, right, strict=True)]
    np.testing.assert_allclose(pearson(*sides), expected, atol=1e-14)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_very_small_and_large_values_correlate_like_others(scale):
    left, right = map(torch.tensor, rows_of(0, "real"))
    torch.testing.assert_close(pearson(left * scale, right), pearson(left, right))


def test_constant_rows_count_as_zero():
    rows = torch.tensor([[0.1, 0.1, 0.1], [1.0, 2.0, 3.0]], dtype=torch.float64)
    truth = torch.tensor([[1.0, 2.0, 3.0], [2.0, 3.0, 5.0]], dtype=torch.float64)
    for correlation in (pearson, spearman):
        assert correlation(rows, truth)[0] == 0
        assert correlation(truth, rows)[0] == 0
    assert is_constant(rows).tolist() == [True, False]
    assert is_constant(rows, noise=0.7).tolist() == [True, True]


def test_a_mean_has_its_standard_error():
    found = RowCorrelation(torch.tensor([0.1, 0.5, 0.3], dtype=torch.float64), constant=0)
    assert found.mean == pytest.approx(0.3)
    assert found.standard_error == pytest.approx(0.2 / 3**0.5)
    assert repr(found) == "0.300 +- 0.115 over 3 test examples"
    single = RowCorrelation(torch.tensor([0.0]), constant=1)
    assert single.standard_error is None
    assert repr(single) == "0.000 over 1 test examples, 1 of constant scores"


def test_a_truth_without_differences_is_refused():
    truth = torch.tensor([[1.0, 2.0], [3.0, 3.0]])
    with pytest.raises(
        InvalidArgumentError,
        match=r"in `outputs`, 1 of 2 test examples have the same value everywhere \(the first is "
        r"test example 1: 3\).*leave them out",
    ):
        check_truth(truth, "outputs")
    with pytest.raises(InvalidArgumentError, match=r"has 1 value a test example; .* at least two"):
        check_truth(truth[:, :1], "outputs")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: numbers([1.0], "scores", "[m, n]"), r"`scores` has shape \[1\]; expected \[m, n"),
        (lambda: numbers([[]], "scores", "[m, n]"), r"`scores` has shape \[1, 0\]; expected"),
        (
            lambda: numbers([[1.0, float("inf")]], "scores", "[m, n]"),
            r"1 of the 2 values in `scores` are not finite; the first is inf at \[0, 1\]",
        ),
        (lambda: subset_masks([True]), r"`subsets` has shape \[1\]; expected \[S, n\]"),
        (lambda: subset_masks([[True]], 2), r"`subsets` has shape \[1, 1\]; expected \[S, 2\]"),
        (lambda: subset_masks([[0, 3]]), r"`subsets` holds 3; .*\(masks, not places\)"),
        (lambda: subset_masks([[1, 0], [0, 0]]), "subset 1 has no examples to train on"),
        (lambda: places([0.5], 3), r"`indices` has shape \[1\] and torch.float32; expected int"),
        (lambda: places([True], 3), r"and torch.bool; expected integers \[k\]"),
        (lambda: places([0, 3], 3), "`indices` holds 3; the training set has 3 examples, 0 to 2"),
        (lambda: places([-1], 3), "`indices` holds -1"),
    ],
)
def test_what_is_no_such_array_is_refused(call, message):
    with pytest.raises(InvalidArgumentError, match=message):
        call()


def test_places_may_be_all():
    assert places(None, 3).tolist() == [0, 1, 2]
    assert places(np.array([2, 0]), 3).tolist() == [2, 0]
