"""The ranking of self-influence: order, names, marks."""

import pytest
import torch
from drawn import is_drawable
from matplotlib.colors import same_color

from influence_kit.errors import InvalidArgumentError
from influence_kit.viz import self_influence_ranking
from influence_kit.viz.colours import NEUTRAL, RIGHT, WRONG

SCORES = torch.tensor([0.5, 8.0, 2.0, 8.0, 1.0])
IS_WRONG = [False, True, True, False, False]


def test_the_highest_are_named_in_order_equal_ones_by_place():
    figure = self_influence_ranking(SCORES, first=3)
    bars, whole = figure.axes
    assert [label.get_text() for label in bars.get_yticklabels()] == ["#1", "#3", "#2"]
    assert [bar.get_width() for bar in bars.patches] == [8, 8, 2]
    assert bars.get_ylim() == (2.5, -0.5)
    assert whole.lines[0].get_xydata().tolist() == [[1, 8], [2, 8], [3, 2], [4, 1], [5, 0.5]]
    assert whole.get_yscale() == "log"
    assert whole.get_legend() is None
    assert bars.get_title() == "the 3 highest"
    assert is_drawable(figure)


def test_wrong_labels_are_told_apart():
    names = ["a", "b", "c $1$", "d", "e"]
    figure = self_influence_ranking(SCORES, names, IS_WRONG)
    bars, whole = figure.axes
    labels = bars.get_yticklabels()
    assert [label.get_text() for label in labels] == ["b", "d", "c $1$", "e", "a"]
    wrong = [True, False, True, False, False]
    for label, bar, mark in zip(labels, bars.patches, wrong, strict=True):
        assert same_color(label.get_color(), WRONG if mark else NEUTRAL)
        assert same_color(bar.get_facecolor(), WRONG if mark else RIGHT)
        assert label.get_parse_math() is False
    marked = {line.get_label(): line.get_xydata().tolist() for line in whole.lines[1:]}
    assert marked == {
        "label right": [[2, 8], [4, 1], [5, 0.5]],
        "label wrong": [[1, 8], [3, 2]],
    }
    assert [text.get_text() for text in whole.get_legend().get_texts()] == list(marked)


def test_scores_that_are_not_all_positive_are_on_a_linear_scale():
    assert self_influence_ranking(SCORES - 1).axes[1].get_yscale() == "linear"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": ["a"]}, r"got 5 scores, \{'names': 1\} and first=20; there must be one of each"),
        ({"is_wrong": [True]}, r"got 5 scores, \{'is_wrong': 1\}"),
        ({"first": 0}, r"and first=0; .*at least one to name"),
        ({"scores": [1.0, float("nan")]}, r"1 of the 2 values in `scores` are not finite"),
    ],
)
def test_what_cannot_be_ranked_is_refused(arguments, message):
    with pytest.raises(InvalidArgumentError, match=message):
        self_influence_ranking(**{"scores": SCORES, **arguments})
