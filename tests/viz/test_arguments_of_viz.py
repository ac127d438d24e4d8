"""What figures and reports cannot take, and what the errors say."""

import pytest
import torch

from influence_kit import KMostInfluentialResults, viz
from influence_kit.errors import InvalidArgumentError

BEST = KMostInfluentialResults(torch.tensor([[1, 0]]), torch.tensor([[0.5, 0.25]]))
IMAGES = torch.rand(2, 4, 4)


def images(**changed):
    given = {
        "queries": IMAGES[:1],
        "query_titles": ["a"],
        "proponents": BEST,
        "opponents": BEST,
        "train_images": IMAGES,
        "train_labels": [0, 1],
    }
    return viz.proponents_and_opponents(**{**given, **changed})


def report():
    return viz.Report("Title", ["a", "b"])


CASES = [
    (lambda: viz.comparison(3), "`result` must be what `evaluation.compare` returned; got 3"),
    (
        lambda: viz.detection_curves({"a": ([0.0, 1.0], [0.0, 2.0])}),
        "the curve 'a' has values from 0 to 2; both halves are shares, between 0 and 1",
    ),
    (
        lambda: viz.detection_curves({"a": 3}),
        r"the curve 'a' must be a pair \(inspected, found\); got 3",
    ),
    (
        lambda: viz.predicted_and_actual({"a": 3}),
        r"'a' must be a pair \(predicted, actual\); got 3",
    ),
    (
        lambda: images(proponents=torch.zeros(1, 2)),
        r"`proponents` must be what `influence\(..., k=k\)` returned, .*; got tensor",
    ),
    (
        lambda: images(opponents=(torch.zeros(1, 2, dtype=int), torch.zeros(1, 3))),
        r"`opponents` has indices of shape \[1, 2\] and influence_scores of \[1, 3\]; both must",
    ),
    (
        lambda: images(opponents=(torch.tensor([[0, 2]]), torch.zeros(1, 2))),
        "`opponents.indices` holds 2; the training set has 2 examples, 0 to 1",
    ),
    (lambda: images(heads="ab"), "`heads` must be two texts, for proponents and for .*; got 'ab'"),
    (lambda: images(cmap=3), "`cmap` must be a name in matplotlib.colormaps, .*; got 3"),
    (lambda: images(queries=torch.zeros(1, 0, 4)), r"an image of shape \[0, 4\] has no pixels"),
    (
        lambda: images(train_images=IMAGES * torch.nan),
        r"an image of shape \[4, 4\] has pixels that are not finite",
    ),
    (
        lambda: report().explain(["a", "b"], BEST),
        r"`proponents` has shape \[1, 2\]; it must be \[m, k\], with one row for each of the 2",
    ),
    (lambda: report().figure("a", "b"), "`figure` must be a matplotlib.figure.Figure; got 'b'"),
    (lambda: report().write(3), "`path` must be a path, a str or pathlib.Path; got 3"),
    (lambda: report().write(""), "is a folder; pass the path of a file"),
]


@pytest.mark.parametrize(("call", "message"), CASES)
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(InvalidArgumentError, match=message):
        call()


def test_a_folder_is_no_file_to_write(tmp_path):
    with pytest.raises(InvalidArgumentError, match="is a folder; pass the path of a file"):
        report().write(tmp_path)


def test_without_opponents_a_figure_is_drawn():
    none = KMostInfluentialResults(torch.zeros(1, 0, dtype=int), torch.zeros(1, 0))
    assert images(opponents=none).subfigs
