"""What the figures hold: axes, titles, pixels and lines, rather than how they are drawn."""

import itertools

import numpy as np
import pytest
import torch
from drawn import is_drawable
from matplotlib.colors import same_color
from matplotlib.figure import Figure

from influence_kit import KMostInfluentialResults, TracInCP
from influence_kit.errors import InvalidArgumentError
from influence_kit.viz import detection_curves, proponents_and_opponents, suspects, text_table
from influence_kit.viz.captions import score_text
from influence_kit.viz.colours import NEUTRAL, RIGHT, WRONG

TRAIN = torch.arange(6 * 4 * 5.0).view(6, 1, 4, 5)
LABELS = torch.tensor([7, 8, 9, 7, 8, 9])
TESTS = -torch.arange(2 * 4 * 5.0).view(2, 4, 5)
TITLES = ["true 7\npredicted 7", "true 8\npredicted 9"]
PROPONENTS = KMostInfluentialResults(
    torch.tensor([[0, 3, 5], [1, 4, 2]]), torch.tensor([[2.0, 1.0, 0.5], [30.0, 0.25, 1e-4]])
)
OPPONENTS = KMostInfluentialResults(
    torch.tensor([[2, 1], [5, 0]]), torch.tensor([[-2.0, -1.0], [-30.0, -1e4]])
)


def pixels(axes):
    return np.asarray(axes.images[0].get_array())


def explained(**changes):
    arguments = {
        "queries": TESTS,
        "query_titles": TITLES,
        "proponents": PROPONENTS,
        "opponents": OPPONENTS,
        "train_images": TRAIN,
        "train_labels": LABELS,
    }
    return proponents_and_opponents(**{**arguments, **changes})


def test_rows_hold_the_test_image_then_proponents_then_opponents():
    figure = explained()
    assert type(figure) is Figure
    assert [axes.get_title() for axes in figure.axes] == [
        *TITLES,
        *["#0\n+2.00\nlabel 7", "#3\n+1.00\nlabel 7", "#5\n+0.500\nlabel 9"],
        *["#1\n+30.0\nlabel 8", "#4\n+0.250\nlabel 8", "#2\n+0.000100\nlabel 9"],
        *["#2\n-2.00\nlabel 9", "#1\n-1.00\nlabel 8"],
        *["#5\n-30.0\nlabel 9", "#0\n-1.00e+04\nlabel 7"],
    ]
    shown = [*TESTS, *TRAIN[[0, 3, 5, 1, 4, 2, 2, 1, 5, 0], 0]]
    for axes, image in zip(figure.axes, shown, strict=True):
        np.testing.assert_array_equal(pixels(axes).squeeze(), image)
    assert is_drawable(figure)


def test_groups_may_have_other_names_and_titles_dollar_signs():
    figure = explained(heads=("raised it", "lowered it"), query_titles=["$5$", "a $ b"])
    heads = [group.get_suptitle() for group in figure.subfigs if group.get_suptitle()]
    assert heads == ["test image", "raised it", "lowered it"]
    assert figure.axes[0].title.get_parse_math() is False


def test_groups_have_the_names_of_what_the_method_measures():
    model, data = torch.nn.Linear(2, 2), torch.utils.data.TensorDataset(torch.zeros(6, 2))
    method = TracInCP(model, data, [model.state_dict()], test_output_fn=lambda o, t: o[:, 0])
    heads = [g.get_suptitle() for g in explained(method=method).subfigs if g.get_suptitle()]
    assert heads[1:] == ["proponents: raised its output", "opponents: lowered its output"]


def test_groups_are_named_and_stand_left_to_right():
    figure = explained()
    heads = [group.get_suptitle() for group in figure.subfigs if group.get_suptitle()]
    assert heads == ["test image", "proponents: lowered its loss", "opponents: raised its loss"]
    figure.draw_without_rendering()
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    first_row = [boxes[place] for place in (0, 2, 3, 4, 8, 9)]
    for left, right in itertools.pairwise(first_row):
        assert left.x1 <= right.x0  # titles included: nothing overlaps
    for column in ((0, 1), (2, 5), (8, 10)):
        assert boxes[column[0]].y0 >= boxes[column[1]].y1


def test_wrong_training_labels_have_the_word_and_the_colour():
    figure = explained(is_wrong=torch.tensor([True, False, False, False, False, False]))
    wrong = [axes for axes in figure.axes if "wrong" in axes.get_title()]
    assert [axes.get_title() for axes in wrong] == [
        "#0\n+2.00\nlabel 7, wrong",
        "#0\n-1.00e+04\nlabel 7, wrong",
    ]
    for axes in figure.axes:
        colour = WRONG if axes in wrong else NEUTRAL
        assert same_color(axes.title.get_color(), colour)
        assert (axes.spines["top"].get_linewidth() > 1) == (axes in wrong)


def test_no_opponents_asked_for_leaves_their_side_empty():
    none = KMostInfluentialResults(torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, 0))
    figure = explained(opponents=none)
    assert len(figure.axes) == 2 + 6
    assert is_drawable(figure)


def test_long_labels_are_wrapped():
    figure = explained(train_labels=["a flat-coated golden retriever"] * 6)
    assert figure.axes[2].get_title() == "#0\n+2.00\nlabel a\nflat-coated\ngolden retriever"


def test_suspects_say_right_and_wrong_where_the_truth_is_known():
    titles = [f"{place + 1}. #{place}" for place in range(5)]
    truth = [7, 1, 9, 7, 2]
    figure = suspects(TRAIN[:5], titles, LABELS[:5], truth, columns=3)
    drawn = [axes for axes in figure.axes if axes.get_visible()]
    assert len(figure.axes) == 6
    assert [axes.get_title() for axes in drawn] == [
        "1. #0\nlabel 7: right",
        "2. #1\nlabel 8: wrong\n(it is 1)",
        "3. #2\nlabel 9: right",
        "4. #3\nlabel 7: right",
        "5. #4\nlabel 8: wrong\n(it is 2)",
    ]
    for axes, wrong in zip(drawn, [False, True, False, False, True], strict=True):
        assert same_color(axes.title.get_color(), WRONG if wrong else RIGHT)
    np.testing.assert_array_equal(pixels(drawn[4]).squeeze(), TRAIN[4, 0])
    assert is_drawable(figure)


def test_suspects_without_the_truth_show_the_given_label():
    figure = suspects(TRAIN[:2], ["first", "second"], ["cat", "dog"])
    assert [axes.get_title() for axes in figure.axes] == ["first\nlabel cat", "second\nlabel dog"]
    assert same_color(figure.axes[0].title.get_color(), NEUTRAL)


def test_colour_images_are_drawn_as_they_are():
    colour = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0))
    bytes_ = (colour * 255).to(torch.uint8)
    figure = suspects([colour, bytes_], ["a", "b"], [0, 1])
    np.testing.assert_array_equal(pixels(figure.axes[0]), colour.permute(1, 2, 0))
    np.testing.assert_allclose(pixels(figure.axes[1]), bytes_.permute(1, 2, 0) / 255, atol=1e-6)


def test_curves_are_drawn_with_the_diagonal():
    curves = {
        "good": (torch.tensor([0.0, 0.5, 1.0]), torch.tensor([0.0, 1.0, 1.0])),
        "poor": ([0.0, 0.5, 1.0], [0.0, 0.25, 1.0]),
    }
    figure = detection_curves(curves, until=0.5)
    (axes,) = figure.axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines == {
        "good": [[0, 0], [0.5, 1], [1, 1]],
        "poor": [[0, 0], [0.5, 0.25], [1, 1]],
        "random order": [[0, 0], [1, 1]],
    }
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(lines)
    assert len({line.get_linestyle() for line in axes.lines}) == 3
    assert axes.get_xlabel() == "training examples inspected, highest score first"
    assert axes.get_ylabel() == "wrong labels found"
    assert axes.get_xlim() == (0, 0.5)
    assert is_drawable(figure)
    assert [tick.get_text() for tick in axes.get_yticklabels()][:2] == ["0%", "20%"]


def test_no_figure_is_left_with_pyplot():
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    explained()
    suspects(TRAIN[:1], ["a"], [0])
    detection_curves({"a": ([0, 1], [0, 1])})
    assert pyplot.get_fignums() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_titles": ["one"]}, r"got 2 test images, and \{'query_titles': 1, 'proponents': 2"),
        (
            {"queries": TESTS[:1], "query_titles": ["one"]},
            r"got 1 test images, and .*'opponents': 2",
        ),
        ({"queries": []}, r"got 0 test images"),
        ({"queries": [torch.zeros(3), torch.zeros(3)]}, r"an image has shape \[3\]; expected"),
        ({"train_images": torch.zeros(6, 2, 4, 5)}, r"an image has shape \[2, 4, 5\]; expected"),
        (
            {"train_images": torch.full((6, 3, 4, 5), -2.0)},
            r"3 channels has values from -2 to -2; expected 0 to 1 .*undo its normalization",
        ),
    ],
    ids=["titles", "results", "none", "vector", "two channels", "normalized"],
)
def test_what_cannot_be_drawn_is_refused(changes, message):
    with pytest.raises(InvalidArgumentError, match=message):
        explained(**changes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((TRAIN[:0], [], []), r"got 0 images"),
        ((TRAIN[:2], ["a"], [0, 1]), r"got 2 images, \{'titles': 1, 'given_labels': 2\}"),
        ((TRAIN[:2], ["a", "b"], [0, 1], [0]), r"got 2 images, .*'true_labels': 1\}"),
        ((TRAIN[:2], ["a", "b"], [0, 1], None, 0), r"and 0 columns; there must be at least one"),
    ],
)
def test_suspects_of_other_numbers_are_refused(arguments, message):
    with pytest.raises(InvalidArgumentError, match=message):
        suspects(*arguments)


def test_curves_that_cannot_be_drawn_are_refused():
    with pytest.raises(InvalidArgumentError, match=r"`curves` is empty; pass a dict \{name:"):
        detection_curves({})
    with pytest.raises(InvalidArgumentError, match=r"the curve 'a' has 2 shares inspected and 1"):
        detection_curves({"a": ([0, 1], [0])})
    with pytest.raises(
        InvalidArgumentError, match=r"`until` must be a positive number and at most 1; got 0"
    ):
        detection_curves({"a": ([0, 1], [0, 1])}, until=0)


def test_tables_align_numbers_right_and_words_left():
    table = text_table(["name", "AUC", "found"], [["a", 0.5, "9%"], ["longer", 12.25, "100%"]])
    assert table.splitlines() == [
        "name      AUC  found",
        "------  -----  -----",
        "a         0.5     9%",
        "longer  12.25   100%",
    ]
    assert text_table(["a", "b"], []).splitlines() == ["a  b", "-  -"]
    some = text_table(["none", "some"], [["-", 0.5], ["-", "-"]]).splitlines()
    assert some[2:] == ["-      0.5", "-        -"]


def test_a_row_of_other_length_is_refused():
    with pytest.raises(InvalidArgumentError, match=r"row 1 of the table has 1 cells .* 2: \['x'\]"):
        text_table(["a", "b"], [["x", "y"], ["x"]])


@pytest.mark.parametrize(
    ("score", "text"),
    [(0.03123, "+0.0312"), (-12345, "-1.23e+04"), (140.2, "+140"), (60, "+60.0"), (0, "+0.00")],
)
def test_scores_have_a_sign_and_three_digits(score, text):
    assert score_text(score) == text
