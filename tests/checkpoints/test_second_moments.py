"""Second moments in checkpoints: those that the optimizer holds, or an error that says why not."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from influence_kit.checkpoints.second_moments import second_moments
from influence_kit.errors import InvalidArgumentError


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def stepped(model: nn.Module, optimizer: Any, steps: int = 3) -> dict[str, Any]:
    for seed in range(steps):
        x = torch.randn(6, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), torch.arange(6) % 2).backward()
        optimizer.step()
    held = {"state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}
    return copy.deepcopy(held)


def test_those_of_adam_are_without_bias() -> None:
    """With betas of 0 and one step they are the squares of the gradient."""
    model = net()
    saved = stepped(model, torch.optim.Adam(model.parameters(), betas=(0.0, 0.9), eps=0.5), 1)
    squares = {name: p.grad.square() for name, p in model.named_parameters()}
    found = second_moments(model, saved)
    assert list(found) == list(squares)
    for name, own in found.items():
        assert torch.allclose(own.value, squares[name], rtol=1e-12, atol=0)
        expected = 1 / (squares[name].sqrt() + 0.5)
        assert torch.allclose(own.scales(squares[name]), expected.flatten(), rtol=1e-12)


def test_those_of_adafactor_have_the_means_of_rows_and_columns() -> None:
    model = net()
    saved = stepped(model, torch.optim.Adafactor(model.parameters(), lr=0.1))
    found = second_moments(model, saved, "adafactor")
    for number, (name, parameter) in enumerate(model.named_parameters()):
        held, value = saved["optimizer"]["state"][number], found[name].value
        assert value.shape == parameter.shape
        if parameter.dim() == 1:
            assert torch.equal(value, held["variance"])
        else:
            rows, columns = held["row_var"][:, 0], held["col_var"][0]
            expected = torch.outer(rows, columns) / rows.mean()
            assert torch.allclose(value, expected, rtol=1e-12, atol=0)


def test_gradients_that_were_zero() -> None:
    """Means of zero have no quotient: all scales are 0."""
    model = net()
    saved = stepped(model, torch.optim.Adafactor(model.parameters(), lr=0.1))
    state = saved["optimizer"]["state"][0]
    state["row_var"].zero_()
    state["col_var"].zero_()
    found = second_moments(model, saved, "adafactor")["0.weight"]
    assert not found.scales(torch.zeros(0, dtype=torch.float64)).any()


def damaged(**changed: Any) -> dict[str, Any]:
    model = net()
    saved = stepped(model, torch.optim.Adafactor(model.parameters(), lr=0.1))
    saved["optimizer"]["state"][0] |= changed
    return saved


@pytest.mark.parametrize(
    "changed",
    [
        {"row_var": None},
        {"row_var": torch.full((4, 1), torch.nan)},
        {"row_var": -torch.ones(4, 1)},
        {"row_var": torch.ones(3)},
        {"row_var": torch.ones(4, 2)},
        {"col_var": torch.ones(2, 3)},
    ],
)
def test_damaged_means(changed: dict[str, Any]) -> None:
    with pytest.raises(
        InvalidArgumentError, match=r"must have finite tensors .'row_var', 'col_var"
    ):
        second_moments(net(), damaged(**changed), "adafactor")


def test_errors() -> None:
    model = net()
    match = r"moments of Adafactor cannot be read from checkpoint in memory: its optimizer is not"
    adam = stepped(model, torch.optim.Adam(model.parameters()))
    with pytest.raises(InvalidArgumentError, match=match):
        second_moments(model, adam, "adafactor")
    fresh = stepped(model, torch.optim.Adafactor(model.parameters()), 0)
    with pytest.raises(InvalidArgumentError, match="took no steps, and has no moments"):
        second_moments(model, fresh, "adafactor")
    with pytest.raises(InvalidArgumentError, match="optimizer has 4 parameters, and `parameter_n"):
        second_moments(nn.Linear(5, 2), damaged(), "adafactor", ["weight", "bias", "a", "b"])
    saved = damaged()
    saved["optimizer"]["state"][1] = 3
    with pytest.raises(InvalidArgumentError, match=r"or of all entries; got 3"):
        second_moments(model, saved, "adafactor")
