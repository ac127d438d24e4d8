"""LESS: Adam's own step, one example at a time, is the oracle; the contract has its cosines."""

import copy

import oracles
import pytest
import torch
from cases import SHORT, Examples
from contract import assert_close, with_adam
from torch import nn

from influence_kit import LESS
from influence_kit.errors import InvalidArgumentError
from influence_kit.scoring import AdamDirections


@pytest.mark.parametrize("name", SHORT)
def test_dot_products(name):
    case = SHORT[name]
    made = LESS(
        case.model(), Examples(case.train), with_adam(case), loss_fn=case.loss, similarity="dot"
    )
    given = (case.model(), case.train, case.test, case.loss, with_adam(case))
    assert_close(made.influence(case.test), oracles.adam_scores(*given, cosine=False))


def test_a_dot_product_is_the_fall_of_the_test_loss_in_a_small_step():
    """Adam's real step of rate 1e-6 on the training example alone, in the units of the score."""
    case, rate = SHORT["mlp"], 1e-6
    checkpoint = with_adam(case)[0]
    scores = LESS(
        case.model(),
        Examples(case.train),
        [{**checkpoint, "learning_rate": rate}],
        loss_fn=case.loss,
        similarity="dot",
    ).influence(case.test)
    for i in (0, 3):
        model = case.model()
        model.load_state_dict(checkpoint["state_dict"])
        before = case.loss(model(case.test[0]), case.test[1]).detach()
        optimizer = torch.optim.Adam(model.parameters())
        optimizer.load_state_dict(copy.deepcopy(checkpoint["optimizer"]))
        optimizer.param_groups[0]["lr"] = rate
        example = oracles.one(case.train, i)
        optimizer.zero_grad()
        case.loss(model(example[0]), example[1]).sum().backward()
        optimizer.step()
        fall = before - case.loss(model(case.test[0]), case.test[1]).detach()
        assert torch.allclose(scores[:, i], fall, rtol=1e-4, atol=1e-12)


def test_a_stateless_parameter_steps_by_the_sign_of_its_gradient():
    """M = (1 - beta1) g and v = (1 - beta2) g^2, both corrected: g / (|g| + eps)."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    optimizer = torch.optim.Adam(model.parameters(), eps=0.5)
    model.bias.grad = torch.ones(2, dtype=torch.float64)
    optimizer.step()
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.arange(5) % 2
    saved = {"state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}
    data, loss = torch.utils.data.TensorDataset(x, y), nn.CrossEntropyLoss()
    found = LESS(model, data, [saved], loss_fn=loss, similarity="dot").influence((x, y))
    g = oracles.gradients(model, (x, y), nn.CrossEntropyLoss(reduction="none"))
    weights = g[:, :6]
    expected = 0.001 * (g[:, :6] @ (weights / (weights.abs() + 0.5)).T)
    bias = oracles.adam_directions(model, saved, g)[:, 6:]
    assert_close(found, expected + 0.001 * g[:, 6:] @ bias.T)


def test_errors():
    case = SHORT["mlp"]
    given = (case.model(), Examples(case.train))
    with pytest.raises(InvalidArgumentError, match='`similarity` must be "cosine" or "dot"; got 3'):
        LESS(*given, with_adam(case), loss_fn=case.loss, similarity=3)
    with pytest.raises(InvalidArgumentError, match="`parameter_names` must be a list"):
        LESS(*given, with_adam(case), loss_fn=case.loss, parameter_names=3)
    plain = LESS(*given, case.checkpoints(), loss_fn=case.loss)
    with pytest.raises(InvalidArgumentError, match="Adam cannot be read from checkpoint in memory"):
        plain.influence(case.test)
    with pytest.raises(
        InvalidArgumentError, match="`checkpoint` must be the index of one of 2 che"
    ):
        AdamDirections(case.model(), with_adam(case)).at(2)


def test_a_parameter_that_the_optimizer_does_not_have():
    case = SHORT["mlp"]
    model = case.model()
    model.head.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained)
    case.loss(model(case.train[0]), case.train[1]).sum().backward()
    optimizer.step()
    saved = {"state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    model.requires_grad_(True)
    given = {"loss_fn": case.loss, "parameter_names": names}
    with pytest.raises(
        InvalidArgumentError, match=r"does not have the parameter 'head.weight': it"
    ):
        LESS(model, Examples(case.train), [saved], **given).influence(case.test)
    chosen = [name.rpartition(".")[0] for name in names]
    found = LESS(model, Examples(case.train), [saved], layers=chosen, **given)
    assert found.influence(case.test).shape == (case.m, case.n)
