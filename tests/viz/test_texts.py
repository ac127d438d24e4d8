"""Texts that helped and hurt: what stands where, and that nothing is cut off."""

import pytest
import torch
from drawn import is_drawable, overlapping
from matplotlib.colors import same_color

from influence_kit import KMostInfluentialResults, TracInCP
from influence_kit.errors import InvalidArgumentError
from influence_kit.viz import influential_texts
from influence_kit.viz.colours import NEGATIVE, NEUTRAL, POSITIVE

TEXTS = ["short", "two  \n words", "it costs $5$, not $6", "w" * 300, " ", "a word " * 60]
PROPONENTS = KMostInfluentialResults(
    torch.tensor([[0, 3], [5, 1]]), torch.tensor([[2.0, 0.0], [1, 0.5]])
)
OPPONENTS = KMostInfluentialResults(torch.tensor([[2], [4]]), torch.tensor([[-1.0], [-3e-5]]))


def drawn(queries=("first query", "second query"), **arguments):
    return influential_texts(queries, PROPONENTS, OPPONENTS, TEXTS, **arguments)


def lines_of(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def test_texts_stand_under_their_places_scores_and_labels():
    figure = drawn(train_labels=torch.arange(6), lines=1)
    assert lines_of(figure) == [
        "first query",
        *["proponents: lowered its loss", "opponents: raised its loss"],
        *["#0 | +2.00 | 0", "#2 | -1.00 | 2", "short", "it costs $5$, not $6"],
        *["#3 | +0.00 | 3", "w" * 54 + " ..."],
        "second query",
        *["proponents: lowered its loss", "opponents: raised its loss"],
        *["#5 | +1.00 | 5", "#4 | -3.00e-05 | 4", ("a word " * 9)[:54] + " ...", "(empty)"],
        *["#1 | +0.500 | 1", "two words"],
    ]
    assert is_drawable(figure)


def test_signs_have_colours_and_dollar_signs_no_meaning():
    texts = {text.get_text(): text for text in drawn().axes[0].texts}
    for line, colour in {
        "#0 | +2.00": POSITIVE,
        "#2 | -1.00": NEGATIVE,
        "#3 | +0.00": NEUTRAL,
        "short": NEUTRAL,
    }.items():
        assert same_color(texts[line].get_color(), colour)
    assert not any(text.get_parse_math() for text in texts.values())


def test_proponents_stand_left_of_opponents_beside_each_other():
    texts = {text.get_text(): text.get_position() for text in drawn().axes[0].texts}
    left, right = texts["#0 | +2.00"], texts["#2 | -1.00"]
    assert left[0] < right[0]
    assert left[1] == right[1]
    assert texts["first query"][1] > left[1] > texts["#3 | +0.00"][1] > texts["second query"][1]


def test_nothing_overlaps_or_is_cut_off():
    figure = influential_texts(["W" * 400, "i"], PROPONENTS, OPPONENTS, ["W" * 500] * 6, lines=4)
    figure.draw_without_rendering()
    assert overlapping(figure.axes[0].texts) == []
    whole = figure.bbox
    for text in figure.axes[0].texts:
        box = text.get_window_extent()
        assert whole.x0 <= box.x0
        assert box.x1 <= whole.x1
        assert whole.y0 <= box.y0
        assert box.y1 <= whole.y1


def test_heads_are_those_of_what_the_method_measures():
    model, data = torch.nn.Linear(2, 2), torch.utils.data.TensorDataset(torch.zeros(6, 2))
    given = (model, data, [model.state_dict()])
    of_output = TracInCP(*given, test_output_fn=lambda o, t: o[:, 0])
    assert "proponents: raised its output" in lines_of(drawn(method=of_output))
    assert "opponents: lowered its output" in lines_of(drawn(method=of_output))
    assert "proponents: lowered its loss" in lines_of(drawn(method=TracInCP(*given)))
    assert "up" in lines_of(drawn(method=of_output, heads=("up", "down")))


def test_other_heads_and_the_number_of_lines():
    figure = drawn(lines=3, heads=("raised it", "lowered it"))
    assert "raised it" in lines_of(figure)
    assert sum("a word" in line for line in lines_of(figure)) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"queries": ["one"]},
            r"got 1 test texts, results of 2 \(proponents\) and 2 \(opponents\)",
        ),
        ({"queries": []}, r"got 0 test texts"),
        ({"lines": 0}, r"and lines=0; there must be at least one test text and line"),
    ],
)
def test_other_numbers_are_refused(arguments, message):
    with pytest.raises(InvalidArgumentError, match=message):
        drawn(**arguments)
