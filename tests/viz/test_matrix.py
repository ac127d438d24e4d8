"""The matrix of features: values, names, decimals."""

import pytest
import torch
from drawn import is_drawable, overlapping

from influence_kit.errors import InvalidArgumentError
from influence_kit.viz import feature_matrix

VALUES = torch.tensor([[1.0, -2.5, 0.004], [-0.04, 0.0, 2.0]])
ROWS, COLUMNS = ["one", "two $x$"], ["a", "b", "c"]


def test_cells_have_their_values_and_a_scale_around_zero():
    figure = feature_matrix(VALUES, ROWS, COLUMNS, "points")
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == [
        "+1.0",
        "-2.5",
        "+0.0",
        "+0.0",
        "+0.0",
        "+2.0",
    ]
    assert axes.images[0].get_clim() == (-2.5, 2.5)
    assert [label.get_text() for label in axes.get_yticklabels()] == ROWS
    assert [label.get_text() for label in axes.get_xticklabels()] == COLUMNS
    assert axes.get_title() == "points"
    assert is_drawable(figure)


@pytest.mark.parametrize(
    ("size", "written"),
    [(12345.0, "+12345"), (99.0, "+99"), (1.0, "+1.0"), (0.012, "+0.012"), (3e-7, "+3.0e-07")],
)
def test_the_largest_has_two_digits(size, written):
    figure = feature_matrix([[size, 0.0]] * 2, ["a", "b"], ["c", "d"])
    assert figure.axes[0].texts[0].get_text() == written
    figure.draw_without_rendering()
    assert overlapping(figure.axes[0].texts) == []


def test_zeros_alone_are_drawn():
    assert is_drawable(feature_matrix([[0.0]], ["a"], ["b"]))


def test_other_numbers_of_names_are_refused():
    with pytest.raises(
        InvalidArgumentError, match=r"`values` has shape \[2, 3\]; there are 1 names"
    ):
        feature_matrix(VALUES, ["one"], COLUMNS)
