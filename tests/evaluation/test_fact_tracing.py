"""Fact tracing against a plain loop over sorted examples."""

import numpy as np
import pytest
import torch

from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation import fact_tracing

M, N = 9, 25
GENERATOR = torch.Generator().manual_seed(0)
SCORES = torch.randint(-3, 4, (M, N), generator=GENERATOR).double()  # many are equal
RELEVANT = torch.rand(M, N, generator=GENERATOR) < 0.15
RELEVANT[:, 4] = True


@pytest.mark.parametrize("k", [1, 5, N])
def test_ranks_are_those_of_a_loop(k):
    ranks = []
    for row, marks in zip(SCORES, RELEVANT, strict=True):
        order = sorted(range(N), key=lambda i, row=row: -float(row[i]))
        ranks.append(next(rank for rank, i in enumerate(order, 1) if marks[i]))
    found = fact_tracing(SCORES, RELEVANT, k)
    assert found.reciprocal_rank.per_test.tolist() == pytest.approx([1 / rank for rank in ranks])
    assert found.recall.per_test.tolist() == [float(rank <= k) for rank in ranks]
    line = repr(found).splitlines()[-1].split()
    assert line[:3] == ["recall", "at", str(k)]
    assert line[3] == f"{np.mean([rank <= k for rank in ranks]):.3f}"


CASES = [
    (
        lambda: fact_tracing(SCORES, RELEVANT[:2]),
        r"`scores` has shape \[9, 25\] and `relevant` \[2, 25\]; both must be",
    ),
    (
        lambda: fact_tracing(SCORES, torch.zeros(M, N)),
        r"9 of 9 test examples have no relevant training example \(the first is test example 0\)",
    ),
    (lambda: fact_tracing(SCORES, SCORES), r"`relevant` holds .*; it must hold booleans, or 0 and"),
    (lambda: fact_tracing(SCORES, RELEVANT, 26), "`k` must be a positive int and at most 25"),
]


@pytest.mark.parametrize(("call", "message"), CASES)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(InvalidArgumentError, match=message):
        call()
