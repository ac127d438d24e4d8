"""Removal of what scores point at, in models whose outputs are sums over training examples."""

import pytest
import torch
from torch import nn

from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation import Retraining, brittleness, removal_curve

# what each training example (a column) adds to the margin of each test example (a row)
VOTES = torch.tensor([[5.0, -1.0, -2.0, 1.0, -1.0], [-1.0, 4.0, 3.0, -2.0, -2.0]])
N = 5


def train(indices, seed):
    """A model whose two outputs are the sums of its examples' votes, and the seed."""
    model = nn.Linear(1, 2)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(VOTES[:, indices].sum(1) + seed)
    return model


def margins(model):
    return model(torch.zeros(1))


def classes(model):
    return (margins(model) > 0).long()


def test_predictions_flip_once_their_proponents_are_gone():
    # margins are 2 and 2; without 5: -3; without 4: -2 (seed 0). With seed 3: 0 (no more positive)
    # and 1; without two: -1 and -2
    found = brittleness(VOTES, train, classes, counts=[1, 2], seeds=[0, 3])
    assert found.counts == (1, 2)
    assert found.flipped.tolist() == [[1.0, 1.0], [0.5, 1.0]]
    assert found.share.tolist() == [0.75, 1.0]
    assert found.standard_error.tolist() == pytest.approx([0.25, 0.0])
    assert repr(found).splitlines()[2:] == ["      1    75.0%", "      2   100.0%"]


def test_what_is_removed_is_the_top_of_each_test_example():
    seen = []

    def recorded(indices, seed):
        seen.append(sorted(set(range(N)) - set(indices.tolist())))
        return train(indices, seed)

    scores = [[0.0, 2.0, 2.0, 1.0, -3.0], [1.0, 0.0, 0.0, 0.0, 5.0]]
    brittleness(scores, recorded, classes, counts=[1, 3])
    assert seen == [[], [1], [1, 2, 3], [4], [0, 1, 4]]


def test_a_single_test_example_has_no_standard_error():
    found = brittleness(VOTES[:1], train, lambda model: classes(model)[:1], counts=[1])
    assert found.standard_error is None


def test_models_are_kept(tmp_path):
    retraining = Retraining(train, tmp_path)
    brittleness(VOTES, retraining, classes, counts=[1])
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    removal_curve(VOTES[0], retraining, margins, fractions=[0.2], repeats=1)
    # by score it removes what the first test example loses, with the same seed
    assert len(list(tmp_path.glob("*.safetensors"))) == 4


@pytest.mark.parametrize("keep", [False, True])
def test_curves_are_the_means_of_the_models(keep):
    scores, fractions, seeds = VOTES.sum(0), [0.2, 0.5, 0.8], [7, 8]
    found = removal_curve(scores, train, margins, fractions, keep, repeats=2, seed=7)
    assert found.fractions == (0.2, 0.5, 0.8)
    order = sorted(range(N), key=lambda i: -float(scores[i]))
    for place, size in enumerate([1, 3, 4]):
        for column, seed in enumerate(seeds):
            drawn = torch.randperm(N, generator=torch.Generator().manual_seed(seed)).tolist()
            for curve, by in ((found.by_score, order), (found.at_random, drawn)):
                trained_on = by[:size] if keep else by[size:]
                expected = VOTES[:, trained_on].sum(1).mean() + seed
                assert float(curve[place, column]) == pytest.approx(float(expected))


def test_curves_are_printed_with_their_errors():
    found = removal_curve(VOTES.sum(0), train, margins, [0.2], repeats=2)
    lines = repr(found).splitlines()
    assert lines[0].split("  ")[0] == "removed"
    mean, error = found.by_score.mean(), found.by_score.std() / 2**0.5
    assert lines[2].split()[:3] == ["20.0%", f"{mean:.4g}", f"{error:.2g}"]
    single = removal_curve(VOTES.sum(0), train, margins, [0.2], keep=True, repeats=1)
    assert repr(single).split()[0] == "kept"
    assert repr(single).splitlines()[2].split()[2::2] == ["-", "-"]


def test_nothing_and_everything_are_ends_of_the_curves():
    none = removal_curve(VOTES.sum(0), train, margins, [0.0], repeats=1)
    whole = removal_curve(VOTES.sum(0), train, margins, [1.0], keep=True, repeats=1)
    assert none.by_score == none.at_random == whole.by_score == VOTES.sum(1).mean()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: brittleness(VOTES, train, classes, [0]),
            r"`counts` is \[0\]; .* each must be an int from 1",
        ),
        (lambda: brittleness(VOTES, train, classes, [1, 5]), "each must be an int from 1 to 4"),
        (lambda: brittleness(VOTES, train, classes, []), r"`counts` is \[\]; .* at least one"),
        (
            lambda: brittleness(VOTES[:1], train, classes, [1]),
            "`predict` returned 2 classes; there are scores of 1 test examples",
        ),
        (
            lambda: brittleness(VOTES, train, lambda model: margins(model) / 4, [1]),
            "`predict` returned 0.5; it must return predicted classes, whole numbers",
        ),
        (
            lambda: removal_curve(VOTES[0], train, margins, [1.0]),
            r"`fractions` \[1.0\] of 5 examples, \[5\] each; .* 0 to 4 examples to remove",
        ),
        (
            lambda: removal_curve(VOTES[0], train, margins, [0.05], keep=True),
            r"\[0\] each; there must be at least one repeat and fraction, and 1 to 5 .* to keep",
        ),
        (lambda: removal_curve(VOTES[0], train, margins, [0.5], repeats=0), "got 0 repeats"),
        (lambda: removal_curve(VOTES[0], train, margins, []), r"`fractions` \[\] of 5 examples"),
    ],
)
def test_what_cannot_be_removed_is_refused(call, message):
    with pytest.raises(InvalidArgumentError, match=message):
        call()
