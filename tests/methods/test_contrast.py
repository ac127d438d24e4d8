"""Contrast against the difference of two matrices of scores."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from influence_kit import (
    TRAK,
    CGInfluenceFunction,
    EKFACInfluenceFunction,
    GradCos,
    GradDot,
    KNNShapley,
    LoGra,
    TracInCP,
    contrast,
)
from influence_kit.errors import InvalidArgumentError

N, M, C = 23, 4, 7
GENERATOR = torch.Generator().manual_seed(0)


def drawn(n):
    labels = torch.randint(0, 3, (n,), generator=GENERATOR)
    return torch.randn(n, 5, generator=GENERATOR, dtype=torch.float64), labels


TRAIN, QUERY, OTHER = TensorDataset(*drawn(N)), drawn(M), drawn(C)
torch.manual_seed(0)
MODEL = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
CHECKPOINTS = [
    {"state_dict": MODEL.state_dict(), "learning_rate": 0.1},
    {"state_dict": {k: 0.5 * v for k, v in MODEL.state_dict().items()}, "learning_rate": 0.3},
]
METHODS = [GradDot, GradCos, TracInCP, EKFACInfluenceFunction, CGInfluenceFunction, LoGra, TRAK]


def made(kind, **given):
    given = {"loss_fn": nn.CrossEntropyLoss(), "batch_size": 5, **given}
    if kind is TRAK:
        given["projection_dim"] = 8
    return kind(MODEL, TRAIN, CHECKPOINTS, **given)


@pytest.mark.parametrize("kind", METHODS)
def test_the_mean_of_the_contrast_is_subtracted(kind):
    method = made(kind)
    expected = method.influence(QUERY) - method.influence(OTHER).mean(dim=0)
    scale = float(expected.abs().max())
    found = contrast(method, QUERY, OTHER)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * scale)
    for proponents in (True, False):
        best = contrast(method, QUERY, OTHER, k=3, proponents=proponents)
        order = expected.argsort(dim=1, descending=proponents)[:, :3]
        assert best.indices.tolist() == order.tolist()
        torch.testing.assert_close(
            best.influence_scores, expected.gather(1, order), rtol=1e-4, atol=1e-5 * scale
        )


def test_it_is_the_difference_of_the_gradients():
    model = nn.Linear(5, 1, bias=False).double()
    loss_fn, data = nn.MSELoss(reduction="none"), drawn(N)[0]
    train = TensorDataset(data, torch.zeros(N, 1).double())
    query, other = ((drawn(n)[0], torch.zeros(n, 1).double()) for n in (M, C))

    def gradients(x):
        return 2 * model(x).detach() * x

    found = contrast(GradDot(model, train, [model.state_dict()], loss_fn=loss_fn), query, other)
    expected = (gradients(query[0]) - gradients(other[0]).mean(0)) @ gradients(data).T
    torch.testing.assert_close(found, expected)


def test_data_sets_loaders_and_stored_gradients_are_taken():
    method = made(EKFACInfluenceFunction)
    expected = contrast(method, QUERY, OTHER)
    loader = DataLoader(TensorDataset(*OTHER), batch_size=3, shuffle=True)
    for other in (TensorDataset(*OTHER), loader, method.compute_intermediate_quantities(OTHER)):
        torch.testing.assert_close(contrast(method, QUERY, other), expected)


def test_scores_have_the_precision_of_the_model():
    model = nn.Linear(5, 3)
    data = TensorDataset(TRAIN.tensors[0].float(), TRAIN.tensors[1])
    dot = GradDot(model, data, [model.state_dict()], loss_fn=nn.CrossEntropyLoss())
    query, other = ((x.float(), y) for x, y in (QUERY, OTHER))
    assert contrast(dot, query, other).dtype == torch.float32


def test_what_is_not_linear_is_refused():
    shapley = KNNShapley(MODEL, TRAIN, CHECKPOINTS, layer="2")
    with pytest.raises(InvalidArgumentError, match=r"`method` must be an InnerProduct.* subtract"):
        contrast(shapley, QUERY, OTHER)
    with pytest.raises(InvalidArgumentError, match="`inputs` argument is required"):
        contrast(made(GradDot), QUERY, None)
    with pytest.raises(InvalidArgumentError, match="`inputs` argument is required"):
        contrast(made(GradDot), None, OTHER)
    with pytest.raises(TypeError, match=r"k must be an int or None; got 1\.5"):
        contrast(made(GradDot), QUERY, OTHER, k=1.5)
    with pytest.raises(InvalidArgumentError, match="`proponents` must be True or False; got 1"):
        contrast(made(GradDot), QUERY, OTHER, k=1, proponents=1)
