"""A borrowed model comes back as it was, whatever was done with it and however that ended."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from influence_kit import TracInCP
from influence_kit.preservation.restore import borrowed


@pytest.fixture
def model() -> nn.Module:
    """Tied, frozen and missing parameters, buffers, gradients, and layers in both modes."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 4, bias=False)
    )
    model.append(nn.Linear(4, 4))
    model[4].weight = model[3].weight
    model[0].bias.requires_grad_(False)
    model.register_buffer("empty", None)
    model(torch.randn(5, 3)).square().sum().backward()
    model.train()
    model[1].eval()
    return model


def change_values(model):
    with torch.no_grad():
        for tensor in (*model.parameters(), *model[1].buffers()):
            tensor.add_(1)


def load_in_place(model):
    other = {key: torch.zeros_like(value) for key, value in model.state_dict().items()}
    model.load_state_dict(other)


def load_by_assignment(model):
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)


def replace_objects(model):
    model[0].weight = nn.Parameter(torch.zeros(4, 3))
    model[0].bias = None
    model[1].running_mean = torch.ones(4)
    model.empty = torch.ones(2)


def change_flags(model):
    model.train()
    model[3].eval()
    for parameter in model.parameters():
        parameter.requires_grad_(not parameter.requires_grad)


def change_gradients(model):
    model.zero_grad()
    model[4].bias.grad = torch.ones(4)
    model[0].bias.grad = torch.ones(4)


def train_a_step(model):
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    optimizer.zero_grad()
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()


def draw_numbers(model):
    torch.rand(3)
    torch.manual_seed(7)


CHANGES = [
    change_values,
    load_in_place,
    load_by_assignment,
    replace_objects,
    change_flags,
    change_gradients,
    train_a_step,
    draw_numbers,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_comes_back_as_it_was(model, unchanged, change):
    with unchanged(model), borrowed(model):
        change(model)


def change_and_fail(model, change, error):
    with borrowed(model):
        change(model)
        raise error("stopped here")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize("change", CHANGES)
def test_a_model_comes_back_as_it_was_after_an_error_which_goes_on(model, unchanged, change, error):
    with unchanged(model), pytest.raises(error, match="stopped here"):
        change_and_fail(model, change, error)


def test_a_model_borrowed_twice_comes_back_each_time(model, unchanged):
    with unchanged(model), borrowed(model):
        load_in_place(model)
        with unchanged(model), borrowed(model, eval_mode=False):
            train_a_step(model)


@pytest.mark.parametrize(("eval_mode", "inside"), [(True, [False]), (False, [False, True])])
def test_inside_the_model_is_in_evaluation_mode_if_asked(model, eval_mode, inside):
    with borrowed(model, eval_mode):
        assert sorted({module.training for module in model.modules()}) == inside


def test_inside_weights_and_gradients_are_the_users(model, unchanged):
    with borrowed(model, eval_mode=False), unchanged(model):
        pass


def test_numbers_drawn_afterwards_are_those_drawn_without_it(model):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with borrowed(model):
        list(torch.utils.data.DataLoader(torch.arange(4)))
    assert torch.equal(torch.rand(2), expected)


def test_a_model_without_parameters_is_borrowed_too(unchanged):
    model = nn.Sequential(nn.Flatten(), nn.Dropout())
    with unchanged(model), borrowed(model):
        assert not model[1].training


def test_an_autocast_around_keeps_no_weight_of_another_checkpoint(model):
    model, x = nn.Linear(4, 3), torch.randn(6, 4)
    states = [{name: (c + 1) * v.clone() for name, v in model.state_dict().items()} for c in (0, 1)]
    data = TensorDataset(x, torch.arange(6) % 3)

    def scores(checkpoints):
        influence = TracInCP(model, data, checkpoints, loss_fn=nn.CrossEntropyLoss(), batch_size=3)
        return influence.influence((x[:2], data.tensors[1][:2]))

    with torch.autocast("cpu", torch.bfloat16):
        model(x)
        both, alone = scores(states), [scores([state]) for state in states]
        torch.testing.assert_close(both, sum(alone))
        with torch.no_grad():
            model(x)
        scores(states)
        model(x).float().sum().backward()
    assert model.weight.grad is not None
    apart = sum(scores_outside(scores, [state]) for state in states)
    torch.testing.assert_close(both, apart)


def scores_outside(scores, checkpoints):
    """The same in an autocast of its own."""
    with torch.autocast("cpu", torch.bfloat16):
        return scores(checkpoints)
