"""The picture of a comparison: its numbers, bars and lines."""

import pytest
import torch
from drawn import is_drawable

from influence_kit.evaluation import SubsetTruth, compare, half_subsets
from influence_kit.viz import comparison

GENERATOR = torch.Generator().manual_seed(0)
SCORES = {name: torch.randn(4, 12, generator=GENERATOR) for name in ("one", "another")}
SUBSETS = half_subsets(12, 9)
OUTPUTS = torch.randn(9, 3, 4, generator=GENERATOR)


def test_the_matrix_has_the_correlations_by_name():
    result = compare(SCORES, None)
    figure = comparison(result)
    (axes,) = figure.axes
    assert axes.images[0].get_array().tolist() == result.agreement.tolist()
    assert axes.images[0].get_clim() == (-1, 1)
    names = ["one", "another"]
    assert [label.get_text() for label in axes.get_xticklabels()] == names
    assert [label.get_text() for label in axes.get_yticklabels()] == names
    cells = [text.get_text() for text in axes.texts]
    assert cells == [f"{value:.2f}" for value in result.agreement.flatten().tolist()]
    assert is_drawable(figure)


@pytest.mark.parametrize("repeats", [1, 3])
def test_bars_end_at_the_scores(repeats):
    result = compare(SCORES, None, SubsetTruth(SUBSETS, OUTPUTS[:, :repeats], "margin"))
    figure = comparison(result)
    matrix, bars = figure.axes
    assert len(matrix.images) == 1
    widths = [bar.get_width() for bar in bars.patches]
    assert widths == pytest.approx([score.mean for score in result.scores])
    # from the top down, as the rows of the matrix
    assert bars.get_ylim() == (1.5, -0.5)
    ceilings = [line for line in bars.lines if line.get_linestyle() == "--"]
    if repeats == 1:
        assert ceilings == []
        assert bars.get_title() == "linear datamodeling score"
    else:
        ceiling = result.scores[0].ceiling
        assert ceilings[0].get_xdata() == pytest.approx([ceiling, ceiling])
        assert f"noise ceiling {ceiling:.2f}" in bars.get_title()
    assert is_drawable(figure)
