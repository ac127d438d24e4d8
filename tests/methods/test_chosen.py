"""Which parameters layers stand for, and to which layer a parameter's scores go."""

import pytest
import torch
from torch import nn

from influence_kit import TracInCP
from influence_kit.methods.chosen import choose_parameters, group_by_layer
from influence_kit.methods.layer_names import check_layers


class Tied(nn.Module):
    """A parameter of the model itself, and an embedding whose weight is the head's."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.embedding = nn.Embedding(4, 3)
        self.body = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.body(self.embedding(ids))) * self.scale


ALL = ["scale", "embedding.weight", "body.0.weight", "body.0.bias"]


@pytest.fixture
def model() -> Tied:
    torch.manual_seed(0)
    return Tied().double()


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        (None, ALL),
        (["body"], ALL[2:]),
        (["body.0"], ALL[2:]),
        (["body", "body.0"], ALL[2:]),
        (["head"], ["embedding.weight"]),
        (["head", "embedding"], ["embedding.weight"]),
        ([""], ALL),
    ],
)
def test_layers_stand_for_all_parameters_inside_each_once(model, layers, names):
    assert list(choose_parameters(model, check_layers(model, layers))) == names


def test_without_layers_frozen_parameters_are_left_out(model):
    model.body.requires_grad_(False)
    assert list(choose_parameters(model, None)) == ALL[:2]


def test_a_frozen_parameter_of_a_named_layer_counts_with_a_warning(model):
    model.body[0].bias.requires_grad_(False)
    with pytest.warns(UserWarning, match="grads for layer: body, name: body.0.bias") as caught:
        chosen = choose_parameters(model, ["body"])
    assert list(chosen) == ALL[2:]
    assert len(caught) == 1
    assert not model.body[0].bias.requires_grad


@pytest.mark.parametrize(
    ("layers", "groups"),
    [
        (
            None,
            {"scale": ALL[:1], "embedding": ALL[1:2], "body.0": ALL[2:]},
        ),
        (["body"], {"body": ALL[2:]}),
        (["head", "body.0"], {"head": ALL[1:2], "body.0": ALL[2:]}),
        (["embedding", "head"], {"embedding": ALL[1:2]}),
        ([""], {"": ALL}),
    ],
)
def test_every_parameter_goes_to_the_first_named_layer_that_has_it(model, layers, groups):
    names = list(choose_parameters(model, layers))
    assert group_by_layer(model, names, layers) == groups


def test_scores_of_a_tied_head_are_told_under_the_name_that_was_asked_for(model):
    inputs = (torch.tensor([0, 1, 2]), torch.tensor([1, 2, 3]))
    train = torch.utils.data.TensorDataset(*inputs)
    options = {"layers": ["head"], "loss_fn": nn.CrossEntropyLoss()}
    explainer = TracInCP(model, train, [model.state_dict()], **options)
    found = explainer.influence_by_layer(inputs)
    assert list(found) == ["head"]
    torch.testing.assert_close(found["head"], explainer.influence(inputs))
