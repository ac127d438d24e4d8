"""Which parameters layers stand for, and to which layer a parameter's scores go."""

import pytest
import torch
from torch import nn

from influence_kit import TracInCP
from influence_kit.errors import InvalidArgumentError, UnknownLayerError
from influence_kit.gradients.parameter_selection import choose_parameters, group_by_layer
from influence_kit.methods.layer_names import check_layer, check_layers


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


# What `layers` may be.


class Stack(nn.Module):
    """Blocks as those of a transformer, by name."""

    def __init__(self, depth: int = 3):
        super().__init__()
        self.h = nn.ModuleList(
            nn.ModuleDict({"attn": nn.Linear(2, 2), "mlp": nn.Sequential(nn.Linear(2, 2))})
            for _ in range(depth)
        )
        self.head = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        ("head", ["head"]),
        ("h.*.mlp", ["h.0.mlp", "h.1.mlp", "h.2.mlp"]),
        ("h.[02].attn", ["h.0.attn", "h.2.attn"]),
        ("h.[!0].attn", ["h.1.attn", "h.2.attn"]),
        ("h.?.att?", ["h.0.attn", "h.1.attn", "h.2.attn"]),
        (["h.1*", "head", "h.1.attn"], ["h.1", "h.1.attn", "h.1.mlp", "h.1.mlp.0", "head"]),
        (("head", "h.0.mlp", "head"), ["head", "h.0.mlp"]),
        ("he*", ["head"]),
        ("", [""]),
        ([""], [""]),
    ],
)
def test_names_and_patterns(layers, names):
    assert check_layers(Stack(), layers) == names


def test_modules_and_lists_of_everything():
    model = Stack()
    assert check_layers(model, model.head) == ["head"]
    assert check_layers(model, model) == [""]
    mixed = [model.h[1], "h.*.attn", "head"]
    assert check_layers(model, mixed) == ["h.1", "h.0.attn", "h.1.attn", "h.2.attn", "head"]
    names = list(choose_parameters(model, check_layers(model, mixed)))
    assert len(names) == len(set(names)) == 10
    # a pattern that fits modules inside of others takes each parameter once
    assert list(choose_parameters(model, check_layers(model, "*"))) == [
        name for name, _ in model.named_parameters()
    ]


def test_a_name_that_looks_like_a_pattern_is_itself():
    model = nn.Module()
    model.add_module("a[1]", nn.Linear(2, 2))
    model.add_module("a1", nn.Linear(2, 2))
    assert check_layers(model, "a[1]") == ["a[1]"]


def test_scores_of_a_pattern_are_those_of_its_names(model):
    inputs = (torch.tensor([0, 1, 2]), torch.tensor([1, 2, 3]))
    train = torch.utils.data.TensorDataset(*inputs)

    def explainer(layers):
        states = [model.state_dict()]
        return TracInCP(model, train, states, layers=layers, loss_fn=nn.CrossEntropyLoss())

    expected = explainer(["body.0", "head"])
    for layers in (["body.*", "hea?"], [model.body[0], model.head], (model.body, "head")):
        found = explainer(layers)
        assert isinstance(found.layers, list)
        assert torch.equal(found.influence(inputs), expected.influence(inputs))


def test_a_name_of_a_large_model_is_refused_with_those_near():
    model = Stack(300)
    with pytest.raises(UnknownLayerError) as caught:
        check_layers(model, ["h.*.mpl", "haed"] + [f"x{i}" for i in range(400)])
    text = str(caught.value)
    assert "the model has no layers ['h.*.mpl', 'haed', 'x0'," in text
    assert " and 392 more; it has 1,202 modules; similar names are ['h.9.mlp'" in text
    assert "'head'" in text
    assert len(text) < 500
    with pytest.raises(UnknownLayerError, match=r"1,202 modules, such as \['h', 'h.0', .* more$"):
        check_layers(model, [nn.Tanh()])
    with pytest.raises(UnknownLayerError, match=r"\['zzz'\]; it has 1,202 .* are \['h', 'h.0', "):
        check_layers(model, "zzz")


def test_one_layer():
    model = Stack()
    assert check_layer(model, "h.1") == check_layer(model, model.h[1]) == "h.1"
    with pytest.raises(InvalidArgumentError, match=r"expected one layer; 'h.\*.mlp' matches 3: \["):
        check_layer(model, "h.*.mlp")


def test_a_model_that_is_one_layer_has_no_names() -> None:
    match = (
        r"no layers \['9'\]: it is one layer itself, a Linear without submodules; leave `layers`"
    )
    with pytest.raises(UnknownLayerError, match=match):
        check_layers(nn.Linear(2, 2), ["9"])
