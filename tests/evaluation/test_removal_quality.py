"""Removal quality, in models whose outputs are sums over training examples."""

import pytest
import torch
from torch import nn

from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation import Retraining, removal_quality

M, N = 3, 10
# what each training example adds to the margin of each test example
VOTES = torch.randn(M, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def train(indices, seed):
    """A model whose outputs are the sums of its examples' votes, times the seed plus 1."""
    model = nn.Linear(1, M).double()
    with torch.no_grad():
        model.bias.copy_(VOTES[:, indices].sum(1) * (seed + 1))
    return model


def margins(model):
    return model.bias


def losses(model):
    return -model.bias


@pytest.mark.parametrize(("measure", "kind"), [(losses, "loss"), (margins, "margin")])
def test_quality_is_the_sum_of_the_votes_removed(measure, kind):
    scores = VOTES + torch.randn(M, N, generator=torch.Generator().manual_seed(1))
    found = removal_quality(scores, train, measure, kind, [0.1, 0.3], seeds=[0, 4], draws=2)
    assert found.fractions == (0.1, 0.3)
    for column, count in enumerate([1, 3]):
        for t in range(M):
            top = sorted(range(N), key=lambda i, t=t: -float(scores[t, i]))[:count]
            # the mean over the seeds multiplies by (1 + 5) / 2
            assert found.by_score[t, column] == pytest.approx(3 * float(VOTES[t, top].sum()))
            random = 0.0
            for draw in range(2):
                order = torch.randperm(N, generator=torch.Generator().manual_seed(draw))[:count]
                random += 3 * float(VOTES[t, order].sum()) / 2
            assert found.at_random[t, column] == pytest.approx(random)
    difference = found.by_score - found.at_random
    assert found.quality.tolist() == pytest.approx(difference.mean(0).tolist())
    assert found.standard_error.tolist() == pytest.approx((difference.std(0) / M**0.5).tolist())
    row = repr(found).splitlines()[3].split()
    assert row[:2] == ["30.0%", f"{found.by_score[:, 1].mean():.4g}"]
    assert row[3:] == [f"{found.quality[1]:.4g}", f"{found.standard_error[1]:.2g}"]


def test_without_draws_it_is_the_plain_rise():
    found = removal_quality(VOTES[:1], train, lambda m: losses(m)[:1], fractions=[0.1], draws=0)
    assert found.at_random.tolist() == [[0.0]]
    assert found.quality.item() == pytest.approx(float(VOTES[0].max()))
    assert found.standard_error is None
    assert repr(found).split()[-1] == "-"


def test_models_are_kept(tmp_path):
    retraining = Retraining(train, tmp_path)
    first = removal_quality(VOTES, retraining, losses, fractions=[0.1], draws=1)
    count = len(list(tmp_path.glob("*.safetensors")))
    assert count <= 1 + M + 1
    again = removal_quality(VOTES, retraining, margins, "margin", fractions=[0.1], draws=1)
    torch.testing.assert_close(again.by_score, first.by_score)
    assert len(list(tmp_path.glob("*.safetensors"))) == count


CASES = [
    (
        lambda: removal_quality(VOTES, train, losses, fractions=[0.01]),
        r"`fractions` \[0.01\] of 10 examples, \[0\] each; .* each must remove 1 to 9 examples",
    ),
    (lambda: removal_quality(VOTES, train, losses, fractions=[1.0]), r"\[10\] each"),
    (lambda: removal_quality(VOTES, train, losses, fractions=[]), "there must be at least one"),
    (
        lambda: removal_quality(VOTES[:2], train, losses, fractions=[0.1]),
        "`measure` returned 3 values; there are scores of 2 test examples",
    ),
    (lambda: removal_quality(VOTES, train, losses, draws=-1), "`draws` must be an int of at least"),
    (lambda: removal_quality(VOTES, train, losses, "accuracy"), "`outputs_are` is 'accuracy'"),
]


@pytest.mark.parametrize(("call", "message"), CASES)
def test_what_cannot_be_removed_is_refused(call, message):
    with pytest.raises(InvalidArgumentError, match=message):
        call()
