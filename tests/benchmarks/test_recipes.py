"""Training: against torch's optimisers in a loop written out, closed forms and scikit-learn."""

import math

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn import functional as F

from benchmarks.settings.losses import class_losses, squared_losses
from benchmarks.settings.recipes import MiniBatches, Minimum, WarmupCosine, WarmupLine
from influence_kit.errors import InvalidArgumentError


def examples(n: int = 11):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(n, 4, generator=generator, dtype=torch.float64), torch.arange(n) % 3


def network(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(1)
    layers = nn.Linear(4, 5), nn.Tanh(), nn.Dropout(dropout), nn.Linear(5, 3)
    return nn.Sequential(*layers).double()


def weights(model: nn.Module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.mark.parametrize(
    ("recipe", "optimizer"),
    [
        (
            MiniBatches(3, 4, 0.1, momentum=0.9, weight_decay=0.01),
            lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
        ),
        (
            MiniBatches(3, 4, 0.1, "adam", betas=(0.8, 0.95)),
            lambda p: torch.optim.Adam(p, 0.1, betas=(0.8, 0.95)),
        ),
        (
            MiniBatches(3, 4, 0.1, "adamw", weight_decay=0.2, longest_gradient=0.5),
            lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.2),
        ),
    ],
    ids=["sgd", "adam", "adamw"],
)
def test_steps_are_those_of_an_ordinary_loop(recipe, optimizer):
    x, y = examples()
    model, own = network(), network()
    recipe(model, (x, y), class_losses, seed=7)
    steps = optimizer(own.parameters())
    order = torch.Generator().manual_seed(7)
    for _ in range(3):
        places = torch.randperm(11, generator=order)
        for start in (0, 4, 8):
            rows = places[start : start + 4]
            steps.zero_grad()
            F.cross_entropy(own(x[rows]), y[rows]).backward()
            if recipe.longest_gradient:
                norm = torch.cat([p.grad.flatten() for p in own.parameters()]).norm()
                for p in own.parameters():
                    p.grad *= min(1, 0.5 / (norm + 1e-6))
            steps.step()
    assert torch.allclose(weights(model), weights(own), atol=1e-12)
    assert not model.training
    assert all(p.grad is None for p in model.parameters())


def test_the_seed_decides_order_and_dropout_and_leaves_the_random_state():
    found = []
    for seed in (0, 0, 1):
        model = network(dropout=0.5)
        state = torch.get_rng_state()
        MiniBatches(2, 4, 0.1)(model, examples(), class_losses, seed)
        assert torch.equal(torch.get_rng_state(), state)
        found.append(weights(model))
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2])


def test_a_schedule_warms_up_and_falls_like_a_cosine():
    schedule = WarmupCosine(warmup=0.2, floor=0.1)
    assert schedule(0.1) == pytest.approx(0.5)
    assert schedule(0.2) == pytest.approx(1.0)
    assert schedule(0.6) == pytest.approx(0.1 + 0.9 * 0.5)
    assert schedule(1.0) == pytest.approx(0.1)


def test_a_schedule_warms_up_and_falls_in_a_straight_line():
    schedule = WarmupLine(warmup=0.25, floor=0.1)
    assert [schedule(done) for done in (0.125, 0.25, 0.625, 1.0)] == pytest.approx(
        [0.5, 1.0, 0.55, 0.1]
    )


def test_rates_follow_the_schedule():
    x, y = examples(4)
    recipe = MiniBatches(4, 2, 0.3, schedule=WarmupCosine(warmup=0.25, floor=0.0))
    rates, model, own = [], network(), network()
    recipe(model, (x, y), class_losses, 0, lambda epoch, rate, _: rates.append((epoch, rate)))
    # eight steps, of which two warm up; a rate is that in the middle of its step
    expected = [0.3 * (k + 0.5) / 2 for k in range(2)]
    expected += [0.15 * (1 + math.cos(math.pi * (k + 0.5) / 6)) for k in range(6)]
    assert [epoch for epoch, _ in rates] == [1, 2, 3, 4]
    assert [rate for _, rate in rates] == pytest.approx(expected[1::2])
    order = torch.Generator().manual_seed(0)
    for epoch in range(4):
        for half, rows in enumerate(torch.randperm(4, generator=order).split(2)):
            loss = F.cross_entropy(own(x[rows]), y[rows])
            gradients = torch.autograd.grad(loss, list(own.parameters()))
            with torch.no_grad():
                for p, g in zip(own.parameters(), gradients, strict=True):
                    p -= expected[2 * epoch + half] * g
    assert torch.allclose(weights(model), weights(own), atol=1e-12)


@pytest.mark.parametrize(
    ("recipe", "is_plain"),
    [
        (MiniBatches(1, 2, 0.1, momentum=0.9, weight_decay=0.1), True),
        (MiniBatches(1, 2, 0.1, "adam"), False),
        (MiniBatches(1, 2, 0.1, schedule=WarmupCosine(0.1, 0.1)), False),
        (MiniBatches(1, 2, 0.1, longest_gradient=1.0), False),
    ],
)
def test_plain_sgd_is_told(recipe, is_plain):
    assert recipe.is_plain_sgd == is_plain


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(InvalidArgumentError, match=r"is 'lion'; .* one of sgd, adam, adamw"):
        MiniBatches(1, 2, 0.1, "lion")


def test_the_minimum_of_ridge_regression_has_a_closed_form():
    x, _ = examples(20)
    y = torch.sin(3 * x[:, :1])
    model = nn.Linear(4, 1).double()
    Minimum(weight_decay=0.1)(model, (x, y), squared_losses, seed=0)
    with_bias = torch.cat([x, torch.ones(20, 1, dtype=torch.float64)], 1)
    system = with_bias.T @ with_bias / 20 + 0.1 * torch.eye(5, dtype=torch.float64)
    expected = torch.linalg.solve(system, with_bias.T @ y / 20)[:, 0]
    assert torch.allclose(weights(model), expected, atol=1e-6)


def test_the_minimum_of_logistic_regression_is_scikit_learns():
    x, y = examples(40)
    model = nn.Linear(4, 3, bias=False).double()
    Minimum(weight_decay=0.05)(model, (x, y), class_losses, seed=0)
    # it minimises C * sum of losses + half the squared norm
    other = LogisticRegression(C=1 / (0.05 * 40), fit_intercept=False, tol=1e-10, max_iter=10_000)
    assert torch.allclose(model.weight.detach(), torch.from_numpy(other.fit(x, y).coef_), atol=1e-6)


def test_the_minimum_does_not_depend_on_where_it_starts():
    first, second = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()
    for seed, model in enumerate((first, second)):
        Minimum(weight_decay=0.01)(model, examples(), class_losses, seed)
    assert torch.allclose(weights(first), weights(second), atol=1e-6)


def test_a_minimum_that_is_not_reached_is_an_error():
    model = nn.Linear(4, 3).double()
    with pytest.raises(RuntimeError, match=r"after 2 iterations .* above the tolerance 1e-08"):
        Minimum(weight_decay=0.01, iterations=2)(model, examples(), class_losses, 0)


def test_the_minimum_is_one_epoch():
    model, seen = nn.Linear(4, 3).double(), []
    recipe = Minimum(weight_decay=0.01)
    recipe(model, examples(), class_losses, 0, lambda *epoch: seen.append(epoch))
    assert seen == [(1, 1.0, None)]
    assert recipe.epochs == 1
