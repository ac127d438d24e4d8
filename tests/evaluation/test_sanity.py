"""Sanity metrics against plain loops and scikit-learn."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score, roc_auc_score

from influence_kit import KMostInfluentialResults
from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation import (
    class_detection,
    mixed_datasets,
    model_randomization,
    outlier_share,
    shortcut_detection,
    subclass_detection,
    top_k_cardinality,
)

M, N = 12, 30
GENERATOR = torch.Generator().manual_seed(0)
# few different values, so that many are equal
SCORES = torch.randint(-4, 5, (M, N), generator=GENERATOR).double()
LABELS = torch.randint(0, 3, (N,), generator=GENERATOR)
TEST_LABELS = torch.randint(0, 3, (M,), generator=GENERATOR)
MARKED = torch.rand(N, generator=GENERATOR) < 0.3
TESTS = torch.rand(M, generator=GENERATOR) < 0.5


def top(k):
    """The top k of each test example, by a plain sort: ties by index."""
    return [sorted(range(N), key=lambda i, row=row: -float(row[i]))[:k] for row in SCORES]


def best(k):
    """What ``influence(inputs, k=k)`` returns."""
    indices = torch.tensor(top(k))
    return KMostInfluentialResults(indices, SCORES.gather(1, indices))


@pytest.mark.parametrize("k", [1, 4, N])
@pytest.mark.parametrize("metric", [class_detection, subclass_detection])
def test_the_share_of_the_label_is_that_of_a_loop(metric, k):
    rows = zip(top(k), TEST_LABELS, strict=True)
    expected = [np.mean([int(LABELS[i] == y) for i in row]) for row, y in rows]
    for scores in (SCORES, best(N), best(k)):
        found = metric(scores, TEST_LABELS, LABELS, k)
        assert found.per_test.tolist() == pytest.approx(expected)
    assert found.mean == pytest.approx(np.mean(expected))
    assert found.standard_error == pytest.approx(np.std(expected, ddof=1) / M**0.5)
    assert repr(found) == (
        f"{np.mean(expected):.3f} +- {found.standard_error:.3f} over 12 test examples"
    )


@pytest.mark.parametrize("metric", [shortcut_detection, mixed_datasets])
def test_detection_is_that_of_sklearn(metric):
    found = metric(SCORES, MARKED, TESTS)
    rows = SCORES[TESTS].numpy()
    auc = [roc_auc_score(MARKED, row) for row in rows]
    precision = [average_precision_score(MARKED, row) for row in rows]
    np.testing.assert_allclose(found.auc.per_test, auc)
    np.testing.assert_allclose(found.average_precision.per_test, precision)
    assert found.share == float(MARKED.double().mean())
    lines = repr(found).splitlines()
    error = np.std(auc, ddof=1) / len(auc) ** 0.5
    assert lines[2].split() == ["AUC", f"{np.mean(auc):.3f}", f"{error:.3f}", "0.500"]
    assert lines[3].split()[-1] == f"{found.share:.3f}"


def test_auc_is_one_minus_the_mean_relative_rank():
    scores = torch.rand(1, N, generator=torch.Generator().manual_seed(1))
    order = scores[0].argsort(descending=True)
    ranks = [place for place, i in enumerate(order.tolist()) if MARKED[i]]
    w = len(ranks)
    lowest, highest = (w - 1) / 2, N - (w + 1) / 2
    relative = (np.mean(ranks) - lowest) / (highest - lowest)
    found = shortcut_detection(scores, MARKED, [True])
    assert found.auc.mean == pytest.approx(1 - relative)
    assert found.auc.standard_error is None


def test_randomization_is_the_rank_correlation():
    random = SCORES.flip(0) + 0.1 * torch.randn(M, N, generator=torch.Generator().manual_seed(2))
    expected = [spearmanr(a, b).statistic for a, b in zip(SCORES, random, strict=True)]
    np.testing.assert_allclose(model_randomization(SCORES, random).per_test, expected)
    constant = torch.cat([torch.zeros(1, N), random[1:]])
    found = model_randomization(SCORES, constant, leave_out_constant=True)
    np.testing.assert_allclose(found.per_test, expected[1:])
    assert found.left_out == (0,)


@pytest.mark.parametrize("k", [1, 5])
def test_overlap_is_counted(k):
    lists = top(k)
    counts = {i: sum(i in row for row in lists) for i in range(N)}
    first = sorted(counts, key=lambda i: -counts[i])[:k]
    for scores in (SCORES, best(k)):
        distinct = len({i for row in lists for i in row})
        assert top_k_cardinality(scores, k) == distinct / (M * k)
        found = outlier_share(scores, k)
        assert found.indices.tolist() == first
        assert found.frequency.tolist() == pytest.approx([counts[i] / M for i in first])
        assert found.share == pytest.approx(sum(counts[i] for i in first) / (M * k))


def test_one_outlier_leads_every_list():
    scores = torch.rand(M, N, generator=torch.Generator().manual_seed(3))
    scores[:, 7] = 10.0
    found = outlier_share(scores, k=1)
    assert repr(found) == "1.000 (k = 1); example 7 is in 100.0% of the lists"
    assert top_k_cardinality(scores, k=1) == 1 / M


def test_lists_without_a_common_example_have_fewer_examples_than_k():
    found = outlier_share([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]], k=1)
    assert found.share == 0.5
    assert found.indices.tolist() == [0]


CASES = [
    (lambda: class_detection(SCORES, TEST_LABELS, LABELS, 0), "`k` must be a positive int; got 0"),
    (
        lambda: class_detection(SCORES, TEST_LABELS, LABELS, N + 1),
        "`k` is 31; there are 30 training examples for each test example",
    ),
    (lambda: top_k_cardinality(best(2), 3), "`k` is 3; there are 2 training examples"),
    (
        lambda: class_detection(SCORES, TEST_LABELS[:3], LABELS),
        r"`test_labels` has shape \[3\] and torch.int64; expected one class, an integer, for each",
    ),
    (
        lambda: subclass_detection(SCORES, TEST_LABELS, LABELS[:4]),
        r"`subclasses` has shape \[4\]",
    ),
    (
        lambda: class_detection(best(N), TEST_LABELS, LABELS[:4], N),
        "the top examples have indices up to 29, and `labels` has 4 items; pass one for each",
    ),
    (
        lambda: outlier_share(KMostInfluentialResults(torch.tensor([[-1]]), torch.ones(1, 1)), 1),
        r"`scores.indices` has shape \[1, 1\] and torch.int64; expected indices \[m, k\]",
    ),
    (
        lambda: shortcut_detection(SCORES, MARKED[:5], TESTS),
        "`has_shortcut` has 5 items; `scores` has 30 examples along that dimension",
    ),
    (lambda: mixed_datasets(SCORES, MARKED, TESTS[:5]), "`test_is_adversarial` has 5 items"),
    (
        lambda: mixed_datasets(SCORES, torch.ones(N), TESTS),
        "`is_adversarial` marks 30 of 30 training examples and `test_is_adversarial` .* some but",
    ),
    (
        lambda: shortcut_detection(SCORES, MARKED, torch.zeros(M)),
        "`test_has_shortcut` 0 of 12 test examples; .* at least one test example",
    ),
    (
        lambda: model_randomization(SCORES, SCORES[:2]),
        r"`scores` has shape \[12, 30\] and `random_scores` \[2, 30\]; both must be of the same",
    ),
    (lambda: model_randomization(SCORES, torch.zeros(M, N)), "in `random_scores`, 12 of 12 test"),
]


@pytest.mark.parametrize(("call", "message"), CASES)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(InvalidArgumentError, match=message):
        call()
