"""Finding wrong labels, against scikit-learn and by hand."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score, roc_curve

from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation import detection_curve, mislabel_auc, precision_at, recall_at

FUNCTIONS = {
    "auc": mislabel_auc,
    "recall": lambda scores, is_wrong: recall_at(scores, is_wrong, 0.5),
    "precision": lambda scores, is_wrong: precision_at(scores, is_wrong, 0.5),
    "curve": detection_curve,
}


def tied_case(seed):
    """Scores of few distinct values, so that most are tied."""
    random = np.random.default_rng(seed)
    n = int(random.integers(5, 200))
    scores = random.integers(-3, 4, n).astype(float)
    is_wrong = random.random(n) < 0.3
    is_wrong[:2] = [True, False]
    return scores, is_wrong


@pytest.mark.parametrize("seed", range(20))
def test_auc_is_that_of_sklearn_with_ties(seed):
    scores, is_wrong = tied_case(seed)
    assert mislabel_auc(scores, is_wrong) == pytest.approx(
        roc_auc_score(is_wrong, scores), abs=1e-12
    )


def test_auc_is_that_of_sklearn_without_ties():
    scores = np.random.default_rng(0).normal(size=500)
    is_wrong = np.random.default_rng(1).random(500) < 0.1
    assert mislabel_auc(scores, is_wrong) == pytest.approx(
        roc_auc_score(is_wrong, scores), abs=1e-12
    )


def test_auc_of_known_orders():
    is_wrong = [True, True, False, False]
    assert mislabel_auc([4, 3, 2, 1], is_wrong) == 1.0
    assert mislabel_auc([1, 2, 3, 4], is_wrong) == 0.0
    assert mislabel_auc([7, 7, 7, 7], is_wrong) == 0.5
    # not equal, though they are in float32
    assert mislabel_auc([0.1 + 1e-12, 0.1, 0.05], [True, False, False]) == 1.0


def test_curve_is_the_roc_curve_in_other_units():
    """Found is the true positive rate; inspected mixes it with the false positive rate."""
    scores = np.random.default_rng(0).normal(size=60)
    is_wrong = np.random.default_rng(1).random(60) < 0.3
    inspected, found = detection_curve(scores, is_wrong)
    false_rate, true_rate, _ = roc_curve(is_wrong, scores, drop_intermediate=False)
    share = is_wrong.mean()
    np.testing.assert_allclose(inspected, share * true_rate + (1 - share) * false_rate, atol=1e-12)
    np.testing.assert_allclose(found, true_rate, atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_curve_and_recall_count_by_place_among_ties(seed):
    scores, is_wrong = tied_case(seed)
    n = len(scores)
    order = sorted(range(n), key=lambda i: (-scores[i], i))
    counts = [sum(is_wrong[i] for i in order[:seen]) for seen in range(n + 1)]
    inspected, found = detection_curve(scores, is_wrong)
    np.testing.assert_allclose(inspected, np.arange(n + 1) / n)
    np.testing.assert_allclose(found, np.array(counts) / is_wrong.sum())
    for seen in range(1, n + 1):
        assert recall_at(scores, is_wrong, seen / n) == counts[seen] / is_wrong.sum()
        assert precision_at(scores, is_wrong, seen / n) == counts[seen] / seen


def test_recall_rounds_the_number_of_inspected_examples():
    scores, is_wrong = [5, 4, 3, 2, 1], [1, 1, 0, 1, 0]
    assert recall_at(scores, is_wrong, 0.29) == pytest.approx(1 / 3)  # 1.45: one example
    assert recall_at(scores, is_wrong, 0.3) == pytest.approx(2 / 3)  # 1.5: two examples
    assert recall_at(scores, is_wrong, 0.01) == 0.0
    assert recall_at(scores, is_wrong, 1.0) == 1.0


def test_tensors_arrays_and_lists_are_the_same():
    scores, is_wrong = tied_case(3)
    tensors = torch.tensor(scores, requires_grad=True), torch.tensor(is_wrong)
    lists = scores.tolist(), [int(mark) for mark in is_wrong]
    for function in FUNCTIONS.values():
        expected = function(scores, is_wrong)
        for same in (tensors, lists):
            torch.testing.assert_close(function(*same), expected, rtol=0, atol=0)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize(
    ("scores", "is_wrong", "message"),
    [
        ([1.0, 2.0], [True], "got 2 `scores` and 1 of `is_wrong`; there must be one of each"),
        ([[1.0, 2.0]], [True, False], r"`scores` has shape \[1, 2\]; expected \[n\]"),
        ([1.0, 2.0], [[True, False]], r"`is_wrong` has shape \[1, 2\]; expected \[n\]: True wh"),
        (
            [1.0, float("nan"), float("inf")],
            [True, False, False],
            r"2 of the 3 values in `scores` are not finite; the first is nan at index \[1\]",
        ),
        ([1.0, 2.0], [True, True], r"marks 2 of 2 labels as wrong; there must be at least one"),
        ([1.0, 2.0], [0, 0], r"marks 0 of 2 labels as wrong"),
        ([], [], r"`scores` has shape \[0\]; expected \[n\]"),
        ([1.0, 2.0], [0, 7], r"`is_wrong` holds 7; it must hold booleans, or 0 and 1"),
    ],
    ids=[
        "lengths",
        "matrix",
        "marks",
        "not finite",
        "all wrong",
        "all right",
        "empty",
        "not boolean",
    ],
)
def test_bad_input_is_refused(function, scores, is_wrong, message):
    with pytest.raises(InvalidArgumentError, match=message):
        function(scores, is_wrong)


@pytest.mark.parametrize("fraction", [0, -0.1, 1.5, float("nan")])
def test_a_fraction_outside_the_unit_interval_is_refused(fraction):
    for function in (recall_at, precision_at):
        with pytest.raises(
            InvalidArgumentError, match=f"a positive number and at most 1; got {fraction}"
        ):
            function([1.0, 2.0], [True, False], fraction)


def test_a_precision_of_no_examples_is_refused():
    with pytest.raises(InvalidArgumentError, match=r"share of 0.2 of 2 examples is less than one"):
        precision_at([1.0, 2.0], [True, False], 0.2)
