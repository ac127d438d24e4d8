"""The linear datamodeling score: against scipy, and of models that are linear datamodels."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation import half_subsets, linear_datamodeling_score

M, N, S, R = 6, 20, 30, 4


def random_case(seed=0):
    """Scores, subsets and outputs that partly agree; the outputs are rounded, so that some tie."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(M, N, generator=generator, dtype=torch.float64)
    subsets = half_subsets(N, S, seed=seed)
    noise = torch.randn(S, R, M, generator=generator, dtype=torch.float64)
    outputs = (subsets.double() @ scores.T)[:, None] + 2 * noise
    return scores, subsets, outputs.round()


@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_mean_of_scipys_rank_correlations(seed):
    scores, subsets, outputs = random_case(seed)
    found = linear_datamodeling_score(scores, subsets, outputs, "margin")
    expected = [
        spearmanr([scores[t, mask].sum() for mask in subsets], outputs.mean(1)[:, t]).statistic
        for t in range(M)
    ]
    np.testing.assert_allclose(found.per_test, expected, atol=1e-12)
    assert found.mean == pytest.approx(np.mean(expected))
    assert found.standard_error == pytest.approx(np.std(expected, ddof=1) / M**0.5)
    assert found.constant == 0


def test_a_linear_datamodel_has_a_score_of_one():
    scores, subsets, _ = random_case()
    outputs = subsets.double() @ scores.T + 3.0
    assert linear_datamodeling_score(scores, subsets, outputs, "margin").mean == pytest.approx(1)
    assert linear_datamodeling_score(scores, subsets, -outputs, "loss").mean == pytest.approx(1)
    assert linear_datamodeling_score(scores, subsets, outputs, "loss").mean == pytest.approx(-1)


def test_weights_other_than_zero_and_one_are_taken():
    scores, _, outputs = random_case()
    weights = torch.rand(S, N, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 2
    weights[0] = 0.0
    found = linear_datamodeling_score(scores, weights, outputs, "margin")
    expected = [
        spearmanr([float(row @ scores[t]) for row in weights], outputs.mean(1)[:, t]).statistic
        for t in range(M)
    ]
    np.testing.assert_allclose(found.per_test, expected, atol=1e-12)
    listed = linear_datamodeling_score(scores, weights.tolist(), outputs, "margin")
    assert listed.per_test.tolist() == found.per_test.tolist()
    linear = weights @ scores.T
    assert linear_datamodeling_score(scores, weights, linear, "margin").mean == pytest.approx(1)


def test_subsets_as_floats_are_subsets():
    scores, subsets, outputs = random_case()
    expected = linear_datamodeling_score(scores, subsets, outputs, "margin")
    found = linear_datamodeling_score(scores, subsets.float(), outputs, "margin")
    assert found.per_test.tolist() == expected.per_test.tolist()


def test_arrays_and_lists_are_the_same():
    scores, subsets, outputs = random_case()
    expected = linear_datamodeling_score(scores, subsets, outputs, "margin")
    for change in (lambda tensor: tensor.numpy(), lambda tensor: tensor.tolist()):
        found = linear_datamodeling_score(*map(change, (scores, subsets, outputs)), "margin")
        torch.testing.assert_close(found.per_test, expected.per_test, rtol=0, atol=0)
        assert found.ceiling == expected.ceiling


def test_the_ceiling_of_two_repeats_is_spearman_and_browns():
    scores, subsets, outputs = random_case()
    two = outputs[:, :2]
    between = np.mean([spearmanr(two[:, 0, t], two[:, 1, t]).statistic for t in range(M)])
    found = linear_datamodeling_score(scores, subsets, two, "margin")
    assert found.ceiling == pytest.approx((2 * between / (1 + between)) ** 0.5)


@pytest.mark.parametrize("repeats", [4, 5])
def test_the_ceiling_is_about_what_the_noiseless_truth_reaches(repeats):
    generator = torch.Generator().manual_seed(0)
    subsets = half_subsets(40, 400)
    truth = torch.randn(30, 40, generator=generator, dtype=torch.float64)
    clean = (subsets.double() @ truth.T)[:, None]
    noise = torch.randn(400, repeats, 30, generator=generator, dtype=torch.float64)
    found = linear_datamodeling_score(truth, subsets, clean + 4 * noise, "margin")
    assert found.ceiling == pytest.approx(found.mean, abs=0.02)
    assert 0.7 < found.ceiling < 0.9


def test_repeats_that_do_not_agree_have_a_ceiling_of_zero():
    scores, subsets, outputs = random_case()
    first = outputs[:, :1]
    against = torch.cat([first, -0.9 * first], dim=1)
    found = linear_datamodeling_score(scores, subsets, against, "margin")
    assert found.ceiling == 0.0
    assert linear_datamodeling_score(scores, subsets, first, "margin").ceiling is None


def test_constant_scores_count_as_zero_and_are_counted():
    scores, subsets, outputs = random_case()
    scores[1], scores[4] = 0.0, 0.1  # whose sums over halves differ by rounding only
    found = linear_datamodeling_score(scores, subsets, outputs, "margin")
    assert found.constant == 2
    assert found.per_test[[1, 4]].tolist() == [0, 0]
    assert repr(found).endswith(
        f"over 6 test examples, 2 of constant scores, noise ceiling {found.ceiling:.2f}"
    )


def test_test_examples_without_a_truth_are_left_out_on_request():
    scores, subsets, outputs = random_case()
    outputs[:, :, 3], scores[1] = 2.0, 0.0
    found = linear_datamodeling_score(scores, subsets, outputs, "margin", leave_out_constant=True)
    assert found.left_out == (1, 3)
    kept = [0, 2, 4, 5]
    expected = linear_datamodeling_score(scores[kept], subsets, outputs[:, :, kept], "margin")
    assert torch.equal(found.per_test, expected.per_test)
    assert found.ceiling == expected.ceiling


def test_subsets_are_random_and_of_one_size():
    masks = half_subsets(11, 200, fraction=0.3, seed=5)
    assert masks.shape == (200, 11)
    assert masks.dtype == torch.bool
    assert masks.sum(1).unique().tolist() == [3]
    assert len(masks.unique(dim=0)) > 100
    assert masks.float().mean(0).sub(3 / 11).abs().max() < 0.1
    assert torch.equal(masks, half_subsets(11, 200, fraction=0.3, seed=5))
    assert not torch.equal(masks, half_subsets(11, 200, fraction=0.3, seed=6))


@pytest.mark.parametrize("arguments", [(4, 0), (4, 3, 0.1), (4, 3, 1.0), (4, 3, -0.5)])
def test_no_subsets_are_refused(arguments):
    with pytest.raises(InvalidArgumentError, match="1 to 3 examples in each"):
        half_subsets(*arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"outputs_are": "accuracy"}, r"`outputs_are` is 'accuracy'; it must be \"margin\" \(hig"),
        ({"outputs": torch.ones(S, R)}, r"has 30 subsets and 4 test examples; there are 30"),
        ({"outputs": torch.ones(5, M)}, r"has 5 subsets and 6 test examples; .* 6 test examples"),
        ({"outputs": torch.ones(S)}, r"`outputs` has shape \[30\]; expected \[S, R, m\]"),
        ({"outputs": torch.ones(S, M)}, r"in `outputs`, 6 of 6 test examples have the same value"),
        ({"subsets": torch.ones(S, 3)}, r"`subsets` has shape \[30, 3\]; expected \[S, 20\]"),
        ({"subsets": torch.full((S, 3), 0.5)}, r"shape \[30, 3\]; expected \[S, 20\]: one row per"),
        ({"subsets": torch.full((S, N), torch.inf)}, r"600 of the 600 values in `subsets` are not"),
        ({"subsets": torch.full((S, N), 2)}, r"`subsets` holds 2; it must hold booleans, or 0 and"),
        ({"scores": torch.full((M, N), torch.nan)}, r"120 of the 120 values in `scores` are not"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    scores, subsets, outputs = random_case()
    arguments = {"scores": scores, "subsets": subsets, "outputs": outputs, "outputs_are": "margin"}
    with pytest.raises(InvalidArgumentError, match=message):
        linear_datamodeling_score(**{**arguments, **changes})
