"""What tells one training function from another."""

import functools

import torch
from torch import nn

from influence_kit.evaluation.recipe import seeded
from influence_kit.evaluation.settings import describe_function

RATE = 0.1


def train(indices, seed):
    return RATE


def around(rate):
    def inner(indices, seed, epochs=3):
        return rate, [x for x in indices if x in {"a", "b", "c"}]

    return inner


class Recipe:
    def __init__(self, rate):
        self.rate, self.data = rate, torch.zeros(2)

    def __call__(self, indices, seed):
        return self.rate


def test_numbers_that_a_function_uses_are_seen(monkeypatch):
    assert describe_function(train)["uses"] == {"RATE": 0.1}
    monkeypatch.setitem(globals(), "RATE", 0.2)
    assert describe_function(train)["uses"] == {"RATE": 0.2}
    assert describe_function(around(0.5))["uses"] == {"rate": 0.5, "epochs": 3}
    assert describe_function(functools.partial(around(0.5), 1, epochs=4))["uses"] == {
        "argument 0": 1,
        "rate": 0.5,
        "epochs": 4,
    }
    assert describe_function(Recipe(0.3))["uses"]["rate"] == 0.3
    assert describe_function(Recipe(0.3)) == describe_function(Recipe(0.3))


def test_the_code_of_a_function_is_seen():
    def one(indices, seed):
        return seed + 1

    same = one

    def one(indices, seed):
        # only a comment more
        return seed + 1

    again = one

    def one(indices, seed):
        return seed + 2

    assert describe_function(same) == describe_function(again)
    assert describe_function(same) != describe_function(one)
    assert describe_function(around(1)) == describe_function(around(1))


def test_classes_modules_and_builtins_have_names():
    assert describe_function(Recipe)["name"] == "Recipe"
    assert "code" in describe_function(Recipe)
    loss = describe_function(nn.CrossEntropyLoss(reduction="sum"))
    assert loss["name"] == "CrossEntropyLoss()"
    assert loss["uses"]["reduction"] == "sum"
    assert describe_function(len) == {"name": "len"}


def test_the_random_state_comes_back():
    state = torch.get_rng_state()
    with seeded(3):
        drawn = torch.rand(2)
    assert torch.equal(torch.get_rng_state(), state)
    with seeded(3):
        assert torch.equal(torch.rand(2), drawn)
