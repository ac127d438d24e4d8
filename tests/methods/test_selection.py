"""Selection by groups and in two stages, against full runs."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Subset, TensorDataset

from influence_kit import (
    CGInfluenceFunction,
    EKFACInfluenceFunction,
    GradDot,
    KMostInfluentialResults,
    max_over_groups,
    two_stage,
)
from influence_kit.errors import InvalidArgumentError

N, M = 40, 5
GENERATOR = torch.Generator().manual_seed(0)
TRAIN = TensorDataset(
    torch.randn(N, 6, generator=GENERATOR, dtype=torch.float64), torch.arange(N) % 3
)
QUERY = (torch.randn(M, 6, generator=GENERATOR, dtype=torch.float64), torch.arange(M) % 3)
torch.manual_seed(0)
MODEL = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()
COMMON = {"checkpoints": [MODEL.state_dict()], "loss_fn": nn.CrossEntropyLoss()}
CHEAP = GradDot(MODEL, TRAIN, **COMMON)
KINDS = {
    EKFACInfluenceFunction: {"damping": 0.1, "seed": 0},
    CGInfluenceFunction: {"damping": 0.1, "tol": 1e-12},
}


def expensive(kind):
    def make(indices):
        return kind(MODEL, Subset(TRAIN, indices), hessian_dataset=TRAIN, **COMMON, **KINDS[kind])

    return make


@pytest.mark.parametrize("proponents", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_candidates_have_the_scores_of_the_full_run(kind, proponents):
    full = kind(MODEL, TRAIN, hessian_dataset=TRAIN, **COMMON, **KINDS[kind]).influence(QUERY)
    named = CHEAP.influence(QUERY, k=12, proponents=proponents).indices
    found = two_stage(CHEAP, expensive(kind), QUERY, 4, 12, proponents)
    for t in range(M):
        own = sorted(named[t].tolist(), key=lambda i, t=t: float(full[t, i]), reverse=proponents)
        assert found.indices[t].tolist() == own[:4]
    torch.testing.assert_close(
        found.influence_scores, full.gather(1, found.indices), rtol=1e-6, atol=1e-9
    )


def test_with_all_candidates_it_is_the_full_run():
    kind = EKFACInfluenceFunction
    full = kind(MODEL, TRAIN, hessian_dataset=TRAIN, **COMMON, **KINDS[kind])
    best = full.influence(QUERY, k=6)
    recalls = []
    for count in (6, 15, N):
        found = two_stage(CHEAP, expensive(kind), QUERY, 6, count).indices
        pairs = zip(found.tolist(), best.indices.tolist(), strict=True)
        recalls.append(np.mean([len({*a} & {*b}) / 6 for a, b in pairs]))
    assert recalls == sorted(recalls)
    assert recalls[-1] == 1.0
    # a bound that holds with room to spare
    assert recalls[1] > 0.5


class Fixed:
    """Scores that are given."""

    def __init__(self, scores):
        self.scores = torch.tensor(scores)

    def influence(self, inputs, k=None, proponents=True):
        if k is None:
            return self.scores
        found = self.scores.topk(min(k, self.scores.shape[1]), dim=1, largest=proponents)
        return KMostInfluentialResults(found.indices, found.values)


def test_of_equal_scores_the_first_indices_come_first():
    cheap = Fixed([[0.0, 3.0, 9.0, 5.0]])
    seen = []

    def equal(indices):
        seen.append(indices)
        return Fixed([[1.0] * len(indices)])

    found = two_stage(cheap, equal, None, k=2, candidates=3)
    assert seen == [[1, 2, 3]]
    assert found.indices.tolist() == [[1, 2]]
    assert two_stage(cheap, equal, None, k=9, candidates=9).indices.tolist() == [[0, 1, 2, 3]]


def test_groups_count_by_their_means():
    scores = torch.randn(9, 5, generator=torch.Generator().manual_seed(1))
    groups = [3, -1, 3, 8, 8, 8, -1, 3, 3]
    rows = [
        np.mean([scores[t].numpy() for t in range(9) if groups[t] == g], axis=0) for g in (3, -1, 8)
    ]
    np.testing.assert_allclose(max_over_groups(scores, groups), np.max(rows, axis=0), rtol=1e-6)
    alone = max_over_groups(torch.tensor(np.array(rows)), [0, 1, 2])
    torch.testing.assert_close(alone, max_over_groups(scores, groups), rtol=1e-6, atol=1e-6)


CASES = [
    (lambda: two_stage(CHEAP, len, QUERY, 0, 3), "`k` must be a positive int; got 0"),
    (lambda: two_stage(CHEAP, len, QUERY, 4, 3), "`k` must be a positive int and at most 3; got 4"),
    (lambda: two_stage(3, len, QUERY, 1, 3), r"`cheap` must have `influence\(inputs, k=...\)`"),
    (lambda: two_stage(CHEAP, 3, QUERY, 1, 3), r"`expensive` must be a function, called as exp"),
    (
        lambda: two_stage(CHEAP, len, QUERY, 1, 3),
        "`expensive` returned 13; it must return a method",
    ),
    (
        lambda: two_stage(CHEAP, lambda indices: CHEAP, QUERY, 1, 3),
        r"has scores \[5, 40\] for \d+ training examples and 5 test examples; it must be a method",
    ),
    (
        lambda: two_stage(Fixed([[1.0]]), lambda indices: CHEAP, None, 1, 1),
        "`inputs` argument is required",
    ),
    (lambda: max_over_groups([[1.0]], [0.5]), r"`groups` has shape \[1\] and torch.float64"),
    (lambda: max_over_groups([1.0], [0]), r"`scores` has shape \[1\]; expected \[m, n\]"),
]


@pytest.mark.parametrize(("call", "message"), CASES)
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(InvalidArgumentError, match=message):
        call()


def test_a_cheap_method_without_indices_is_refused():
    class All:
        def influence(self, inputs, k, proponents):
            return torch.zeros(2, 3)

    with pytest.raises(InvalidArgumentError, match=r"`cheap.influence\(inputs, k=2\)` returned"):
        two_stage(All(), len, QUERY, 1, 2)
