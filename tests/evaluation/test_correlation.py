"""Correlations row by row, against scipy."""

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, rankdata, spearmanr

from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation.arrays import (
    class_labels,
    indices_in,
    marks,
    numbers,
    repeated_numbers,
    subset_masks,
)
from influence_kit.evaluation.correlation import (
    RowCorrelation,
    is_constant,
    noise_ceiling,
    pearson,
    ranks,
    row_correlations,
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


@pytest.mark.parametrize("scale", [1e-200, 1e200, 3e307])
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


TRUTH = torch.tensor([[1.0, 2.0, 4.0], [3.0, 3.0, 3.0], [2.0, 1.0, 0.0], [5.0, 1.0, 3.0]])
PREDICTED = torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0], [7.0, 7.0, 7.0], [0.0, 1.0, 5.0]])


def judged(rows, leave_out_constant):
    sides = PREDICTED[rows].double(), TRUTH[rows].double()[None]
    (found,) = row_correlations(sides[0], sides[1], "outputs", leave_out_constant, [spearman])
    return found


def test_a_truth_without_differences_is_refused():
    with pytest.raises(
        InvalidArgumentError,
        match=r"in `outputs`, 1 of 4 test examples have the same value everywhere \(the first is "
        r"test example 1: 3\).*leave them out of all arguments, or pass leave_out_constant=True",
    ):
        judged([0, 1, 2, 3], leave_out_constant=False)
    one = torch.ones(2, 1)
    with pytest.raises(InvalidArgumentError, match=r"has 1 value per test example; .* least two"):
        row_correlations(one, one[None], "outputs", False, [pearson])


def test_constant_rows_are_left_out_where_that_is_asked_for():
    found = judged([0, 1, 2, 3], leave_out_constant=True)
    assert found.left_out == (1, 2)
    assert found.per_test.tolist() == [pytest.approx(1.0), pytest.approx(-0.5)]
    assert found.constant == 0
    assert repr(found) == "0.250 +- 0.750 over 2 test examples, 2 left out"
    counted = judged([0, 2, 3], leave_out_constant=False)
    assert counted.per_test.tolist() == [pytest.approx(1.0), 0.0, pytest.approx(-0.5)]
    assert (counted.left_out, counted.constant) == ((), 1)
    with pytest.raises(InvalidArgumentError, match=r"each of the 2 test examples .* none is left"):
        judged([1, 2], leave_out_constant=True)


def test_the_ceiling_looks_at_what_is_left():
    generator = torch.Generator().manual_seed(0)
    repeats = torch.randn(4, 3, 9, generator=generator, dtype=torch.float64)
    repeats[:, 1] = 2.0
    predicted = torch.randn(3, 9, generator=generator, dtype=torch.float64)
    found = row_correlations(predicted, repeats, "outputs", True, [pearson, spearman])
    for measure, own in zip((pearson, spearman), found, strict=True):
        assert own.ceiling == noise_ceiling(repeats[:, [0, 2]], measure)


@pytest.mark.parametrize("measure", [pearson, spearman])
@pytest.mark.parametrize("repeats", [2, 4, 5])
def test_the_ceiling_is_what_the_noiseless_truth_reaches(measure, repeats):
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(30, 400, generator=generator, dtype=torch.float64)
    noise = torch.randn(repeats, 30, 400, generator=generator, dtype=torch.float64)
    seen = truth + noise
    reached = float(measure(truth, seen.mean(0)).mean())
    assert noise_ceiling(seen, measure) == pytest.approx(reached, abs=0.01)
    assert noise_ceiling(noise, measure) < 0.3
    assert noise_ceiling(seen[:1], measure) is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: numbers([1.0], "scores", "[m, n]"), r"`scores` has shape \[1\]; expected \[m, n"),
        (lambda: numbers([[]], "scores", "[m, n]"), r"`scores` has shape \[1, 0\]; expected"),
        (
            lambda: numbers([[1.0, float("inf")]], "scores", "[m, n]"),
            r"1 of the 2 values in `scores` are not finite; the first is inf at index \[0, 1\]",
        ),
        (
            lambda: repeated_numbers([1.0], "outputs", "[S, R, m]"),
            r"`outputs` has shape \[1\]; expected \[S, R, m\]",
        ),
        (lambda: marks([], "is_wrong", "[n]", "wrong"), r"shape \[0\]; expected \[n\]: wrong"),
        (lambda: class_labels([0.5], "labels", 1), r"`labels` has shape \[1\] and torch.float64"),
        (lambda: subset_masks([True]), r"`subsets` has shape \[1\]; expected \[S, n\]"),
        (lambda: subset_masks([[True]], 2), r"`subsets` has shape \[1, 1\]; expected \[S, 2\]"),
        (lambda: subset_masks([[0, 3]]), r"`subsets` holds 3; .*\(masks, not indices\)"),
        (lambda: subset_masks([[1, 0], [0, 0]]), "subset 1 has no examples to train on"),
        (
            lambda: indices_in([0.5], 3),
            r"`indices` has shape \[1\] and torch.float64; expected int",
        ),
        (lambda: indices_in([True], 3), r"and torch.bool; expected integers \[k\]"),
        (
            lambda: indices_in(torch.arange(0), 3),
            r"shape \[0\] and torch.int64; .* one or more",
        ),
        (
            lambda: indices_in([0, 3], 3),
            "`indices` holds 3; the training set has 3 examples, 0 to 2",
        ),
        (lambda: indices_in([-1], 3), "`indices` holds -1"),
    ],
)
def test_what_is_no_such_array_is_refused(call, message):
    with pytest.raises(InvalidArgumentError, match=message):
        call()


def test_indices_of_an_array():
    assert indices_in(np.array([2, 0]), 3).tolist() == [2, 0]


def test_lists_of_numbers_keep_their_precision():
    close = [0.1, 0.1 + 1e-12]
    assert numbers(close, "scores", "[n]").tolist() == close
    assert repeated_numbers([close], "outputs", "[S, R, m]").tolist() == [[close]]


def test_repeats_may_be_one():
    rows = torch.ones(2, 3)
    assert repeated_numbers(rows, "outputs", "[S, R, m]").shape == (2, 1, 3)
    assert repeated_numbers(rows, "differences", "[R, m, k]").shape == (1, 2, 3)
    assert repeated_numbers(rows[None], "differences", "[R, m, k]").shape == (1, 2, 3)
