"""Leave-one-out by refitting, in closed form, and correlations with it against scipy."""

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.linear_model import Ridge
from torch import nn

from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation import leave_one_out, loo_correlation, ridge_leave_one_out

N, M, D = 15, 4, 3
GENERATOR = torch.Generator().manual_seed(0)
X, TESTS = (torch.randn(k, D, generator=GENERATOR, dtype=torch.float64) for k in (N, M))
Y, TARGETS = (torch.randn(k, generator=GENERATOR, dtype=torch.float64) for k in (N, M))


def refitted(indices, ridge, bias=True):
    """Predictions of the test examples by scikit-learn's ridge regression on some examples."""
    model = Ridge(alpha=ridge, fit_intercept=bias, solver="cholesky" if ridge else "svd")
    return torch.tensor(model.fit(X[indices].numpy(), Y[indices].numpy()).predict(TESTS.numpy()))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ridge", [0.0, 0.3, 10.0])
def test_ridge_in_closed_form_equals_refits(ridge, bias):
    found = ridge_leave_one_out(X, Y, TESTS, ridge, bias)
    everything = torch.arange(N)
    refits = torch.stack([refitted(everything[everything != i], ridge, bias) for i in range(N)], 1)
    torch.testing.assert_close(
        found.predictions, refitted(everything, ridge, bias), atol=1e-10, rtol=0
    )
    torch.testing.assert_close(found.without, refits, atol=1e-10, rtol=0)
    losses = (refits - TARGETS[:, None]) ** 2 - ((found.predictions - TARGETS) ** 2)[:, None]
    torch.testing.assert_close(found.loss_differences(TARGETS), losses, atol=1e-10, rtol=0)


def train_ridge(indices, seed):
    """A ridge regression by its normal equations, as a module; the seed moves its bias."""
    x = torch.cat([X[indices], torch.ones(len(indices), 1)], dim=1)
    penalty = torch.diag(torch.tensor([0.3] * D + [0.0], dtype=torch.float64))
    theta = torch.linalg.solve(x.T @ x + penalty, x.T @ Y[indices])
    model = nn.Linear(D, 1).double()
    with torch.no_grad():
        model.weight.copy_(theta[None, :D])
        model.bias.copy_(theta[D:] + 1e-3 * seed)
    return model


def losses(model):
    return (model(TESTS)[:, 0] - TARGETS) ** 2


def test_real_retraining_equals_the_closed_form():
    expected = ridge_leave_one_out(X, Y, TESTS, 0.3).loss_differences(TARGETS)
    found = leave_one_out(train_ridge, N, losses, "loss")
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
    some = leave_one_out(train_ridge, N, lambda m: -losses(m), "margin", indices=[7, 2])
    torch.testing.assert_close(some, expected[:, [7, 2]], atol=1e-10, rtol=0)


def test_seeds_are_averaged():
    each = [leave_one_out(train_ridge, N, losses, "loss", seeds=[seed]) for seed in (1, 2)]
    both = leave_one_out(train_ridge, N, losses, "loss", seeds=[1, 2])
    torch.testing.assert_close(both, (each[0] + each[1]) / 2)


def test_differences_by_seed():
    each = [leave_one_out(train_ridge, N, losses, "loss", seeds=[seed]) for seed in (1, 2, 5)]
    found = leave_one_out(train_ridge, N, losses, "loss", seeds=[1, 2, 5], by_seed=True)
    torch.testing.assert_close(found, torch.stack(each))
    mean = leave_one_out(train_ridge, N, losses, "loss", seeds=[1, 2, 5])
    torch.testing.assert_close(found.mean(dim=0), mean)


def test_differences_by_seed_tell_the_ceiling():
    scores = torch.randn(M, N, generator=GENERATOR, dtype=torch.float64)
    seeds = scores + torch.randn(2, M, N, generator=GENERATOR, dtype=torch.float64)
    found = loo_correlation(scores, seeds)
    mean = loo_correlation(scores, seeds.mean(dim=0))
    for own, one, reference in [
        (found.pearson, mean.pearson, pearsonr),
        (found.spearman, mean.spearman, spearmanr),
    ]:
        assert torch.equal(own.per_test, one.per_test)
        between = np.mean([reference(*pair).statistic for pair in zip(*seeds, strict=True)])
        assert own.ceiling == pytest.approx((2 * between / (1 + between)) ** 0.5)
        assert one.ceiling is None


def test_constant_rows_are_left_out_on_request():
    rows = torch.tensor([[1.0, 2.0, 4.0], [0.0, 0.0, 0.0], [3.0, 1.0, 2.0]])
    found = loo_correlation(rows, rows.roll(1, dims=0), leave_out_constant=True)
    assert found.pearson.left_out == found.spearman.left_out == (1, 2)
    assert found.spearman.per_test.tolist() == [spearmanr(rows[0], rows[2]).statistic]
    with pytest.raises(InvalidArgumentError, match="or pass leave_out_constant=True"):
        loo_correlation(rows, rows)


def test_correlations_are_those_of_scipy():
    scores = torch.randn(M, N, generator=GENERATOR).round(decimals=1)
    differences = torch.randn(M, N, generator=GENERATOR, dtype=torch.float64)
    found = loo_correlation(scores, differences)
    pairs = list(zip(scores.double(), differences, strict=True))
    for own, reference in [(found.pearson, pearsonr), (found.spearman, spearmanr)]:
        expected = [reference(*pair).statistic for pair in pairs]
        np.testing.assert_allclose(own.per_test, expected, atol=1e-12)
        assert own.mean == pytest.approx(np.mean(expected))
        assert own.standard_error == pytest.approx(np.std(expected, ddof=1) / M**0.5)


def test_constant_scores_count_as_zero():
    found = loo_correlation([[1.0, 1.0], [1.0, 2.0]], [[1.0, 2.0], [1.0, 2.0]])
    assert found.spearman.per_test.tolist() == [0.0, pytest.approx(1.0)]
    assert found.pearson.constant == found.spearman.constant == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: leave_one_out(train_ridge, 1, losses, "loss"), "`n` is 1; leaving one out needs"),
        (lambda: leave_one_out(train_ridge, N, losses, "error"), "`outputs_are` is 'error'"),
        (lambda: leave_one_out(train_ridge, N, losses, "loss", [N]), "`indices` holds 15"),
        (
            lambda: loo_correlation([[1.0, 2.0]], [[1.0, 2.0, 3.0]]),
            r"`scores` has shape \[1, 2\] and `differences` \[1, 3\]; both must be \[m, k\]",
        ),
        (
            lambda: loo_correlation([[1.0, 2.0]], [[3.0, 3.0]]),
            "in `differences`, 1 of 1 test examples have the same value everywhere",
        ),
        (
            lambda: ridge_leave_one_out(X, Y[:3], TESTS, 1.0),
            r"`inputs` has shape \[15, 3\], `targets` \[3\] and `test_inputs` \[4, 3\]; expected",
        ),
        (
            lambda: ridge_leave_one_out(X, Y, TESTS, -1.0),
            "`ridge` must be a number that is not negative; got -1",
        ),
        (
            lambda: ridge_leave_one_out(X[:2], Y[:2], TESTS, 0.0),
            "2 examples of 4 features determine no model with ridge=0.0; give a positive ridge",
        ),
        (
            lambda: ridge_leave_one_out(X[:4], Y[:4], TESTS, 0.0),
            "without example 0 the other 3 determine no model; give a positive",
        ),
        (
            lambda: ridge_leave_one_out(X, Y, TESTS, 1.0).loss_differences(TARGETS[:2]),
            "got 2 test targets for 4 test examples",
        ),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(InvalidArgumentError, match=message):
        call()
