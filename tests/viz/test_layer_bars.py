"""The bars of layers: values, signs, room for the numbers."""

import pytest
import torch
from drawn import is_drawable, overlapping
from matplotlib.colors import same_color

from influence_kit.errors import InvalidArgumentError
from influence_kit.viz import layer_bars
from influence_kit.viz.colours import NEGATIVE, POSITIVE

BY_LAYER = {"conv": torch.tensor([1.0, -2e-5]), "linear": [30.0, 0.25]}
TITLES = ["one\npair", "another"]


def test_a_panel_a_pair_with_a_bar_a_layer():
    figure = layer_bars(BY_LAYER, TITLES)
    assert [axes.get_title() for axes in figure.axes] == [
        "one\npair\nsum +31.0",
        "another\nsum +0.250",
    ]
    for axes, values in zip(figure.axes, ([1.0, 30.0], [-2e-5, 0.25]), strict=True):
        assert [bar.get_width() for bar in axes.patches] == pytest.approx(values)
        for bar, value in zip(axes.patches, values, strict=True):
            assert same_color(bar.get_facecolor(), POSITIVE if value >= 0 else NEGATIVE)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["conv", "linear"]
    assert figure.axes[0].get_ylim() == (1.5, -0.5)
    assert is_drawable(figure)


def test_numbers_stand_within_their_panels():
    values = [[0.007, -0.00012], [-1.1e-5, -99.0], [0.0, 0.0], [-1e-9, 1e-9]]
    by_layer = {"a": [v[0] for v in values], "b": [v[1] for v in values]}
    figure = layer_bars(by_layer, ["pair"] * 4)
    figure.draw_without_rendering()
    for axes in figure.axes:
        assert overlapping(axes.texts) == []
        for text in axes.texts:
            box = text.get_window_extent()
            assert axes.bbox.x0 <= box.x0
            assert box.x1 <= axes.bbox.x1


@pytest.mark.parametrize(
    ("by_layer", "message"),
    [
        ({}, r"`by_layer` is empty; pass a dict \{layer:"),
        ({"a": [1.0]}, r"got 2 titles, and scores of \{'a': 1\} pairs"),
        ({"a": [[1.0], [2.0]]}, r"`the scores of 'a'` has shape \[2, 1\]; expected \[p\]"),
    ],
)
def test_other_numbers_are_refused(by_layer, message):
    with pytest.raises(InvalidArgumentError, match=message):
        layer_bars(by_layer, TITLES)
