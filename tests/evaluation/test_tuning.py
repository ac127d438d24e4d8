"""Damping chosen by LDS: the best value stays, the method is fitted once, errors change nothing."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from influence_kit import EKFACInfluenceFunction, ExplicitInfluenceFunction
from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation import half_subsets, linear_datamodeling_score, tune_damping

N, M = 20, 6
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(N, 3, generator=GENERATOR, dtype=torch.float64)
Y = torch.arange(N) % 2
TESTS = torch.randn(M, 3, generator=GENERATOR, dtype=torch.float64), torch.arange(M) % 2
SUBSETS = half_subsets(N, 15)


def method(kind=ExplicitInfluenceFunction, **settings):
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    train = TensorDataset(X, Y)
    loss = nn.CrossEntropyLoss()
    return kind(model, train, [model.state_dict()], loss_fn=loss, **settings)


def outputs_of(influence):
    """A truth that these scores predict perfectly."""
    return -(SUBSETS.double() @ influence.influence(TESTS).T)


@pytest.mark.parametrize("kind", [ExplicitInfluenceFunction, EKFACInfluenceFunction])
def test_the_value_that_made_the_truth_is_found(kind, monkeypatch):
    truth = outputs_of(method(kind, damping=0.05))
    tuned, fits = method(kind, damping=7.0), []
    part, fit = type(tuned.inverse), type(tuned.inverse).fit
    monkeypatch.setattr(part, "fit", lambda *args: fits.append(1) or fit(*args))
    values = [1e-3, 0.05, "auto", 1.0]
    found = tune_damping(tuned, values, SUBSETS, truth, TESTS, "loss")
    assert found.attribute == "damping"
    assert found.value == tuned.damping == 0.05
    assert found.values == tuple(values)
    for value, score in zip(values, found.scores, strict=True):
        scores = method(kind, damping=value).influence(TESTS)
        expected = linear_datamodeling_score(scores, SUBSETS, truth, "loss")
        torch.testing.assert_close(score.per_test, expected.per_test)
    assert found.scores[1].mean == pytest.approx(1)
    assert not found.is_at_edge
    # the references were fitted four times, the tuned method once
    assert len(fits) == 1 + 4


def test_a_value_at_the_edge_is_said():
    truth = outputs_of(method(damping=0.05))
    found = tune_damping(method(), [0.05, 1.0], SUBSETS, truth, TESTS, "loss")
    assert found.is_at_edge
    lines = repr(found).splitlines()
    assert lines[0].split() == ["damping", "LDS", "std.", "error"]
    assert lines[2].split() == ["0.05", "1.000", "0.000", "chosen"]
    assert lines[-1] == "the best value is the smallest or largest one tried: try more beyond it"
    single = tune_damping(method(), [0.05], SUBSETS, truth[:, :1], TESTS_OF_ONE, "loss")
    assert not single.is_at_edge
    assert repr(single).splitlines()[-1].split() == ["0.05", "1.000", "-", "chosen"]


TESTS_OF_ONE = TESTS[0][:1], TESTS[1][:1]


class Ridged:
    """A method with a ridge, best at 2."""

    ridge = 0.0

    def influence(self, inputs):
        if self.ridge == "broken":
            raise RuntimeError("broken")
        return SCORES + (self.ridge - 2) ** 2 * NOISE


SCORES, NOISE = (torch.randn(M, N, generator=GENERATOR) for _ in range(2))
TRUTH = SUBSETS.float() @ SCORES.T


def test_a_ridge_is_tuned_where_there_is_no_damping():
    ridged = Ridged()
    found = tune_damping(ridged, [1.0, 3.0, 2.0, 0.0], SUBSETS, TRUTH, None, "margin")
    assert (found.attribute, found.value, ridged.ridge) == ("ridge", 2.0, 2.0)
    # of equal ones the first
    assert tune_damping(ridged, [1.0, 3.0], SUBSETS, TRUTH, None, "margin").value == 1.0


def test_an_error_leaves_the_value_as_it_was():
    ridged = Ridged()
    ridged.ridge = 5.0
    with pytest.raises(RuntimeError, match="broken"):
        tune_damping(ridged, [1.0, "broken"], SUBSETS, TRUTH, None, "margin")
    assert ridged.ridge == 5.0


def test_what_cannot_be_tuned_is_refused():
    ridged = Ridged()
    with pytest.raises(InvalidArgumentError, match="`values` is empty; pass one or more dampings"):
        tune_damping(ridged, [], SUBSETS, TRUTH, None, "margin")
    message = r"a Ridged has none of the attributes \['strength'\]; pass the name of the one"
    with pytest.raises(InvalidArgumentError, match=message):
        tune_damping(ridged, [1.0], SUBSETS, TRUTH, None, "margin", attribute="strength")
    ridged.damping = 1.0
    with pytest.raises(InvalidArgumentError, match=r"a Ridged has \['damping', 'ridge'\] of the"):
        tune_damping(ridged, [1.0], SUBSETS, TRUTH, None, "margin")
    tune_damping(ridged, [1.0], SUBSETS, TRUTH, None, "margin", attribute="damping")
