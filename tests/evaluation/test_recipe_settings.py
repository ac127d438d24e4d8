"""A setting counts as part of a recipe, whatever holds it."""

import argparse
import dataclasses
import enum
import functools
import logging
import types
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from influence_kit.core.arguments import check_seed
from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation import Retraining
from influence_kit.evaluation.recipe import seeded
from influence_kit.evaluation.settings import describe_function

SUBSETS = torch.tensor([[True, True, False, False], [False, True, True, True]])


@dataclasses.dataclass
class Config:
    rate: float = 0.1
    sizes: tuple[int, ...] = (8, 8)


class Slotted:
    __slots__ = ("rate",)

    def __init__(self, rate: float) -> None:
        self.rate = rate


class Kind(enum.Enum):
    SGD = 1
    ADAM = 2


Pair = namedtuple("Pair", ["rate", "decay"])


class Callable:
    def __init__(self, rate: Any) -> None:
        self.rate = rate

    def __call__(self, indices: Any, seed: int) -> nn.Module:
        return nn.Linear(1, 1)

    def train(self, indices: Any, seed: int) -> nn.Module:
        return nn.Linear(1, 1)


class Nested:
    def __init__(self, rate: float) -> None:
        self.inner = {"optimizer": types.SimpleNamespace(rate=rate, owner=self)}


class OnClass:
    rate = 0.1


class OnOtherClass(OnClass):
    rate = 0.2


def helper(rate: float) -> Any:
    def step(value: float) -> float:
        return value * rate

    return step


def by_rate(rate: float) -> float:
    return rate


def closure(setting: Any) -> Any:
    def train(indices: Any, seed: int) -> Any:
        return setting

    return train


HOLDERS = {
    "dataclass": lambda rate: closure(Config(rate)),
    "a list in a dataclass": lambda rate: closure(Config(sizes=(8, int(100 * rate)))),
    "slots": lambda rate: closure(Slotted(rate)),
    "dict": lambda rate: closure({"optimizer": {"rate": rate}}),
    "list": lambda rate: closure([0, rate]),
    "set": lambda rate: closure({0.5, rate}),
    "named tuple": lambda rate: closure(Pair(rate, 0)),
    "namespace": lambda rate: closure(types.SimpleNamespace(rate=rate)),
    "argparse": lambda rate: closure(argparse.Namespace(rate=rate)),
    "nested, in a circle": lambda rate: closure(Nested(rate)),
    "enum": lambda rate: closure(Kind.SGD if rate == 0.1 else Kind.ADAM),
    "tensor": lambda rate: closure(torch.tensor([1.0, rate])),
    "array": lambda rate: closure(np.array([1.0, rate])),
    "numpy number": lambda rate: closure(np.float32(rate)),
    "complex": lambda rate: closure(complex(rate)),
    "path": lambda rate: closure(Path(f"data-{rate}")),
    "dtype": lambda rate: closure(torch.float32 if rate == 0.1 else torch.float64),
    "nothing": lambda rate: closure(None if rate == 0.1 else rate),
    "partial": lambda rate: closure(functools.partial(by_rate, rate)),
    "keyword of a partial": lambda rate: functools.partial(Callable(1), config=Config(rate)),
    "helper function": lambda rate: closure(helper(rate)),
    "callable object": lambda rate: Callable(rate),
    "object in a callable object": lambda rate: Callable(Config(rate)),
    "bound method": lambda rate: Callable(Config(rate)).train,
    "class attribute": lambda rate: closure(OnClass() if rate == 0.1 else OnOtherClass()),
    "class": lambda rate: closure(OnClass if rate == 0.1 else OnOtherClass),
    "class weights of a loss": lambda rate: closure(nn.CrossEntropyLoss(torch.tensor([1.0, rate]))),
    "loss": lambda rate: closure(nn.CrossEntropyLoss(label_smoothing=rate)),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_setting_counts_whatever_holds_it(holder: str, tmp_path: Path) -> None:
    make = HOLDERS[holder]
    assert describe_function(make(0.1)) == describe_function(make(0.1))
    assert describe_function(make(0.1)) != describe_function(make(0.2))

    def model_of(train: Any) -> Any:
        """A training function whose models are plain, with the settings of another."""

        def train_fn(indices: torch.Tensor, seed: int, settings: Any = train) -> nn.Module:
            return nn.Linear(1, 1)

        return train_fn

    outputs = [
        Retraining(model_of(make(0.1)), tmp_path).outputs(SUBSETS, lambda m: m.weight[0])
        for _ in range(2)
    ]
    assert torch.equal(*outputs)
    with pytest.raises(InvalidArgumentError, match="were trained otherwise"):
        Retraining(model_of(make(0.2)), tmp_path).outputs(SUBSETS, lambda m: m.weight[0])


@pytest.mark.parametrize(
    "data",
    [
        torch.arange(2000),
        np.zeros(2000),
        list(range(2000)),
        TensorDataset(torch.zeros(3)),
        nn.Linear(2, 2),
        logging.getLogger("train"),
        torch.Generator(),
        torch,
    ],
)
def test_data_weights_and_tools_are_no_settings(data: Any) -> None:
    described = describe_function(closure(data))
    assert len(str(described)) < 400
    assert described == describe_function(closure(data))


def test_weights_are_not_looked_at() -> None:
    assert describe_function(closure(nn.Linear(2, 2))) == describe_function(
        closure(nn.Linear(2, 2))
    )


def test_what_cannot_be_described_is_refused(tmp_path: Path) -> None:
    train = closure(iter([1, 2]))
    with pytest.raises(InvalidArgumentError, match=r"uses 'setting', a list_iterator, .* `label`"):
        Retraining(train, tmp_path).outputs(SUBSETS, lambda m: m.weight[0])
    many = closure([[[i] for i in range(900)] for _ in range(10)])
    with pytest.raises(InvalidArgumentError, match="there are more than 5000 objects in it"):
        describe_function(many)


def test_logs_that_training_writes_are_no_settings(tmp_path: Path) -> None:
    seen: list[int] = []
    counts = {"calls": 0}

    def train_fn(indices: torch.Tensor, seed: int) -> nn.Module:
        seen.append(seed)
        counts["calls"] += 1
        return nn.Linear(1, 1)

    retraining = Retraining(train_fn, tmp_path)
    first = retraining.outputs(SUBSETS[:1], lambda m: m.weight[0])
    both = retraining.outputs(SUBSETS, lambda m: m.weight[0])
    assert torch.equal(both[:1], first)
    assert counts["calls"] == len(seen) == 2


def test_a_setting_that_is_changed_between_questions(tmp_path: Path) -> None:
    config = Config()

    def train_fn(indices: torch.Tensor, seed: int) -> nn.Module:
        return nn.Linear(1, 1) if config.rate else nn.Linear(1, 1, bias=False)

    retraining = Retraining(train_fn, tmp_path)
    retraining.outputs(SUBSETS, lambda m: m.weight[0])
    config.rate = 0.5
    with pytest.raises(InvalidArgumentError, match="were trained otherwise"):
        retraining.outputs(SUBSETS, lambda m: m.weight[0])


@pytest.mark.parametrize("seeds", [(1, 1.5), (True,), ("0",), (None,), (torch.tensor(0.5),)])
def test_seeds_that_are_no_ints(seeds: Any) -> None:
    retraining = Retraining(lambda indices, seed: nn.Linear(1, 1))
    with pytest.raises(InvalidArgumentError, match="a seed must be an int; got"):
        retraining.outputs(SUBSETS, lambda m: m.weight[0], seeds)
    with pytest.raises(InvalidArgumentError, match="a seed must be an int; got"):
        retraining.paired_outputs(SUBSETS, lambda m: m.weight[0], [seeds[-1]] * 2)
    with pytest.raises(InvalidArgumentError, match="a seed must be an int"), seeded(seeds[-1]):
        pass


def test_equal_seeds_and_seeds_of_other_packages() -> None:
    retraining = Retraining(lambda indices, seed: nn.Linear(1, 1))
    with pytest.raises(
        InvalidArgumentError, match="must be distinct: equal seeds train the same model"
    ):
        retraining.outputs(SUBSETS, lambda m: m.weight[0], (1, np.int64(1)))
    found = retraining.outputs(SUBSETS, lambda m: m.weight[0], np.arange(2))
    assert torch.equal(found, retraining.outputs(SUBSETS, lambda m: m.weight[0], range(2)))
    assert check_seed(torch.tensor(3)) == 3
