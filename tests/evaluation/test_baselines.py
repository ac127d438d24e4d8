"""Baselines against plain loops and scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.neighbors import NearestNeighbors
from torch.nn import functional as F

from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation import (
    baselines,
    embedding_cosine,
    label_cosine,
    last_loss,
    log_odds,
    low_margin,
    mean_loss,
    neighbor_disagreement,
    same_label_cosine,
)

N, D, C, CLASSES = 40, 3, 5, 4
GENERATOR = torch.Generator().manual_seed(0)
FEATURES = torch.randn(N, D, generator=GENERATOR, dtype=torch.float64)
LABELS = torch.randint(0, CLASSES, (N,), generator=GENERATOR)
LOGITS = torch.randn(C, N, CLASSES, generator=GENERATOR, dtype=torch.float64)


def test_log_odds_are_those_of_the_probability():
    logits = LOGITS[0].clone().requires_grad_()
    p = logits.softmax(1)[torch.arange(N), LABELS]
    found = log_odds(logits, LABELS)
    torch.testing.assert_close(found, torch.log(p / (1 - p)))
    assert found.requires_grad
    sure = torch.tensor([[200.0, 0.0, -5.0]])  # p rounds to 1
    assert log_odds(sure, torch.tensor([0])).item() == pytest.approx(200 - np.log1p(np.exp(-5)))


def test_losses_are_averaged_or_the_last():
    losses = F.cross_entropy(LOGITS.flatten(0, 1), LABELS.repeat(C), reduction="none").view(C, N)
    torch.testing.assert_close(mean_loss(losses), sum(losses) / C)
    torch.testing.assert_close(last_loss(losses), losses[C - 1])


def test_margins_are_averaged_with_their_sign_reversed():
    expected = [
        np.mean([max(np.delete(z[i], LABELS[i])) - z[i, LABELS[i]] for z in LOGITS.numpy()])
        for i in range(N)
    ]
    np.testing.assert_allclose(low_margin(LOGITS, LABELS), expected)


@pytest.mark.parametrize("rows", [7, 1000])
def test_neighbours_are_those_of_sklearn(monkeypatch, rows):
    monkeypatch.setattr(baselines, "_rows_of", lambda n: rows)
    nearest = NearestNeighbors(n_neighbors=6).fit(FEATURES).kneighbors(return_distance=False)
    expected = (LABELS.numpy()[nearest] != LABELS.numpy()[:, None]).mean(1)
    np.testing.assert_allclose(neighbor_disagreement(FEATURES, LABELS, k=6), expected)


def test_equal_distances_count_by_place():
    points = [[0.0], [1.0], [-1.0], [1.0]]
    assert neighbor_disagreement(points, [0, 1, 0, 0], k=1).tolist() == [1.0, 1.0, 0.0, 1.0]


def test_a_wrong_label_disagrees_with_its_neighbours():
    features = torch.cat([FEATURES - 10, FEATURES + 10])
    labels = torch.tensor([0] * N + [1] * N)
    labels[3] = 1
    for suspicion in (neighbor_disagreement, same_label_cosine):
        assert suspicion(features, labels).argmax() == 3


def test_cosines_are_those_of_sklearn():
    cosines = cosine_similarity(FEATURES)
    expected = []
    for i in range(N):
        others = [j for j in range(N) if j != i and LABELS[j] == LABELS[i]]
        expected.append(-cosines[i, others].mean())
    np.testing.assert_allclose(same_label_cosine(FEATURES, LABELS), expected)
    found = label_cosine(FEATURES[:5], LABELS[:5], 3 * FEATURES, LABELS)
    np.testing.assert_allclose(embedding_cosine(2 * FEATURES[:5], FEATURES), cosines[:5])
    same = (LABELS[:5, None] == LABELS).numpy()
    np.testing.assert_allclose(found, np.where(same, cosines[:5], -cosines[:5]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: log_odds(torch.ones(2, 3), torch.tensor([0, 3])),
            "the logits are of 3 classes and the labels from 0 to 3; there must be at least two",
        ),
        (lambda: log_odds(torch.ones(1, 1), torch.tensor([0])), "the logits are of 1 classes"),
        (lambda: mean_loss([1.0]), r"`losses` has shape \[1\]; expected \[C, n\]"),
        (lambda: last_loss([[torch.nan]]), "1 of the 1 values in `losses` are not finite"),
        (
            lambda: low_margin(LOGITS, LABELS[:3]),
            r"`labels` has shape \[3\] and torch.int64; expected one class, an integer, for each",
        ),
        (lambda: low_margin(LOGITS, LABELS.float()), "torch.float32; expected one class"),
        (
            lambda: neighbor_disagreement(FEATURES, LABELS, k=0),
            "`k` is 0; 40 examples have 1 to 39",
        ),
        (lambda: neighbor_disagreement(FEATURES, LABELS, k=N), "`k` is 40"),
        (
            lambda: same_label_cosine([[1.0], [2.0], [3.0]], [0, 4, 0]),
            "example 1 is the only one of label 4; a label needs two examples to compare",
        ),
        (
            lambda: same_label_cosine([[1.0], [0.0]], [0, 0]),
            "row 1 of `features` is zero, which has no cosine with anything",
        ),
        (
            lambda: label_cosine([[1.0]], [0], [[1.0, 2.0]], [0]),
            "test examples have 1 features and training examples 2; both must have",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(InvalidArgumentError, match=message):
        call()
