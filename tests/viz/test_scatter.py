"""Predicted against actual: points, scales, the slope and the rank correlation."""

import numpy as np
import pytest
import torch
from drawn import is_drawable, overlapping
from scipy.stats import spearmanr

from influence_kit.errors import InvalidArgumentError
from influence_kit.viz import predicted_and_actual

GENERATOR = torch.Generator().manual_seed(0)
PREDICTED = torch.randn(5, 20, generator=GENERATOR, dtype=torch.float64) ** 3
ACTUAL = 1.5 * PREDICTED + torch.randn(5, 20, generator=GENERATOR, dtype=torch.float64) / 9


def test_points_lines_and_numbers_of_a_panel():
    figure = predicted_and_actual({"a": (PREDICTED, ACTUAL), "b": (PREDICTED[0], -PREDICTED[0])})
    first, second = figure.axes
    points = first.collections[0].get_offsets()
    np.testing.assert_allclose(points[:, 0], PREDICTED.flatten())
    np.testing.assert_allclose(points[:, 1], ACTUAL.flatten())
    ranks = np.mean([spearmanr(*pair).statistic for pair in zip(PREDICTED, ACTUAL, strict=True)])
    # a fit through the origin, for each row
    slopes = [np.linalg.lstsq(p[:, None], a)[0][0] for p, a in zip(PREDICTED, ACTUAL, strict=True)]
    (text,) = first.texts
    assert text.get_text() == f"rank correlation {ranks:.2f}\nslope {np.median(slopes):.2f}"
    assert second.texts[0].get_text() == "rank correlation -1.00\nslope -1.00"
    assert first.get_title() == "a"
    assert is_drawable(figure)


def test_the_lines_are_those_of_equal_values_and_of_the_slope():
    axes = predicted_and_actual({"a": (PREDICTED, 2 * PREDICTED)}).axes[0]
    equal, fitted = (line.get_xydata() for line in axes.lines[-2:])
    np.testing.assert_allclose(equal[:, 0], equal[:, 1])
    np.testing.assert_allclose(2 * fitted[:, 0], fitted[:, 1])


def test_both_axes_have_one_scale_which_holds_all_points():
    axes = predicted_and_actual({"a": (PREDICTED, ACTUAL)}, "guess", "truth").axes[0]
    assert axes.get_xlim() == axes.get_ylim()
    low, high = axes.get_xlim()
    assert low < min(PREDICTED.min(), ACTUAL.min())
    assert high > max(PREDICTED.max(), ACTUAL.max())
    assert axes.get_xscale() == axes.get_yscale() == "symlog"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("guess", "truth")


@pytest.mark.parametrize("size", [1.0, 1e-9, 1e7])
@pytest.mark.parametrize("power", [1, 3, 9])
def test_tick_labels_do_not_overlap(size, power):
    values = size * torch.randn(100, generator=GENERATOR, dtype=torch.float64) ** power
    figure = predicted_and_actual({"a": (values, values)})
    figure.draw_without_rendering()
    for labels in (figure.axes[0].get_xticklabels(), figure.axes[0].get_yticklabels()):
        assert len(labels) in (3, 5)
        assert overlapping(labels) == []


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ({}, r"`pairs` is empty; pass a dict \{title:"),
        ({"a": ([1.0, 2.0], [1.0])}, r"'a' has predicted changes of shape \[2\] and actual"),
        ({"a": ([[0.0, 0.0]], [[1.0, 2.0]])}, r"'a' for test example 0 are all zero"),
        ({"a": ([1.0, float("inf")], [1.0, 2.0])}, r"the predictions of 'a'` are not finite"),
    ],
)
def test_what_cannot_be_drawn_is_refused(pairs, message):
    with pytest.raises(InvalidArgumentError, match=message):
        predicted_and_actual(pairs)
