"""Methods side by side, against scipy; stand-ins for methods return scores that are known."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from influence_kit import GradCos, GradDot
from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation import (
    Comparison,
    SubsetTruth,
    compare,
    half_subsets,
    linear_datamodeling_score,
)
from influence_kit.evaluation.cost import Cost, measured

M, N = 4, 12
GENERATOR = torch.Generator().manual_seed(0)
SCORES = {name: torch.randn(M, N, generator=GENERATOR).round(decimals=1) for name in "abc"}
SUBSETS = half_subsets(N, 9)
OUTPUTS = torch.randn(9, 3, M, generator=GENERATOR)


class Known:
    """A method whose scores are known; it remembers what it was asked."""

    def __init__(self, scores):
        self.scores, self.asked = scores, []

    def influence(self, inputs):
        self.asked.append(inputs)
        return self.scores


def test_agreement_is_the_mean_of_scipys_rank_correlations():
    methods = {name: Known(scores) for name, scores in SCORES.items()}
    found = compare(methods, "the inputs")
    assert found.names == ("a", "b", "c")
    assert [method.asked for method in methods.values()] == [["the inputs"]] * 3
    for row, one in enumerate(SCORES.values()):
        for column, other in enumerate(SCORES.values()):
            pairs = zip(one, other, strict=True)
            expected = np.mean([spearmanr(*pair).statistic for pair in pairs])
            assert float(found.agreement[row, column]) == pytest.approx(expected)
    assert found.scores is None
    assert all(cost.seconds >= 0 for cost in found.costs)


def test_scores_are_judged_where_the_truth_is_given():
    found = compare(SCORES, None, SubsetTruth(SUBSETS, OUTPUTS, "loss"))
    for name, score in zip(found.names, found.scores, strict=True):
        expected = linear_datamodeling_score(SCORES[name], SUBSETS, OUTPUTS, "loss")
        assert torch.equal(score.per_test, expected.per_test)
    assert found.costs == (None, None, None)


def test_methods_of_a_list_are_called_by_their_class():
    x, y = torch.randn(N, 3, generator=GENERATOR), torch.arange(N) % 2
    model = nn.Linear(3, 2)
    arguments = (model, TensorDataset(x, y), [model.state_dict()])
    methods = [kind(*arguments, loss_fn=nn.CrossEntropyLoss()) for kind in (GradDot, GradCos)]
    found = compare(methods, DataLoader(TensorDataset(x[:5], y[:5]), batch_size=2))
    assert found.names == ("GradDot", "GradCos")
    rows = [method.influence((x[:5], y[:5])) for method in methods]
    expected = np.mean([spearmanr(*pair).statistic for pair in zip(*rows, strict=True)])
    assert float(found.agreement[0, 1]) == pytest.approx(expected)


def test_it_is_printed_as_two_tables():
    constant = {**SCORES, "flat": torch.ones(M, N)}
    found = compare(constant, None, SubsetTruth(SUBSETS, OUTPUTS, "margin"))
    lines = repr(found).splitlines()
    assert lines[0].split() == ["method", "LDS", "std.", "error", "seconds"]
    score = linear_datamodeling_score(SCORES["a"], SUBSETS, OUTPUTS, "margin")
    assert lines[2].split() == [
        "1", "a", f"{score.mean:.3f}", f"{score.standard_error:.3f}", "-",
    ]  # fmt: skip
    assert lines[6:10] == [
        f"noise ceiling of the LDS: {score.ceiling:.2f}",
        "flat: 4 test examples of constant scores, which count as 0",
        "",
        "mean rank correlation of the scores:",
    ]
    assert lines[10].split() == ["1", "2", "3", "4"]
    for place, line in enumerate(lines[12:]):
        row = [f"{value:.2f}" for value in found.agreement[place].tolist()]
        assert line.split() == [str(place + 1), *row]
    assert len(lines) == 16


def test_many_methods_fit_into_eighty_characters():
    many = {f"method {place}": SCORES["abc"[place % 3]] * (-1) ** place for place in range(23)}
    found = compare(many, None)
    lines = repr(found).splitlines()
    assert max(map(len, lines)) <= 80
    first = [line for line in lines if line.split()[:1] == ["1"]]
    # the methods, and columns 1 to 10, 11 to 20 and 21 to 23
    assert [len(line.split()) for line in first] == [4, 10, 11, 11, 4]
    cells = [cell for line in first[2:] for cell in line.split()[1:]]
    assert cells == [f"{value:.2f}" for value in found.agreement[0].tolist()]


def test_costs_are_printed():
    known = compare({"a": Known(SCORES["a"])}, None)
    assert repr(known).splitlines()[0].split() == ["method", "seconds"]
    assert float(repr(known).splitlines()[2].split()[2]) >= 0
    costs = (Cost(1.25, 30.4), None)
    on_gpu = Comparison(("a", "b"), torch.eye(2), (0, 0), costs, None)
    lines = repr(on_gpu).splitlines()
    assert lines[0].split() == ["method", "seconds", "added", "MiB"]
    assert [line.split()[2:] for line in lines[2:4]] == [["1.25", "30"], ["-", "-"]]


def test_a_call_costs_seconds_and_what_a_gpu_allocates(monkeypatch):
    assert measured(lambda: 7)[0] == 7
    assert measured(lambda: 7)[1].mebibytes is None
    peaks = {0: 3 * 2**20, 1: 2**20}
    asked = []
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(
            torch.cuda, name, lambda device, name=name: asked.append((name, device))
        )
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", peaks.__getitem__)
    found = measured(lambda: peaks.update({1: 6 * 2**20}))[1]
    assert found.mebibytes == 5
    assert found.seconds >= 0
    assert asked[:4] == [
        ("synchronize", 0),
        ("reset_peak_memory_stats", 0),
        ("synchronize", 1),
        ("reset_peak_memory_stats", 1),
    ]
    assert asked[4:] == [("synchronize", 0), ("synchronize", 1)]


def test_a_comparison_leaves_the_settings_of_the_process_alone(monkeypatch):
    def refuse(*arguments, **keywords):
        raise AssertionError("a comparison must not write files")

    monkeypatch.setattr("pathlib.Path.write_text", refuse)
    monkeypatch.setattr("ctypes.CDLL", refuse)
    compare({"a": Known(SCORES["a"])}, None)


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({}, r"`methods` is empty; pass a dict \{name: method\}"),
        ([], r"got the methods \[\]; there must be at least one"),
        ([Known(1), Known(2)], r"got the methods \['Known', 'Known'\]; .*: pass \{name: method\}"),
        (
            {"a": SCORES["a"], "b": SCORES["b"][:, :5]},
            r"the scores of b have shape \[4, 5\], those of a \[4, 12\]; methods are compared on",
        ),
        ({"a": torch.ones(3)}, r"`the scores of a` has shape \[3\]; expected \[m, n\]"),
    ],
)
def test_what_cannot_be_compared_is_refused(methods, message):
    with pytest.raises(InvalidArgumentError, match=message):
        compare(methods, None)


def test_progress_is_shown(capsys):
    compare(SCORES, None, show_progress=True)
    assert "compare: 100%" in capsys.readouterr().err
