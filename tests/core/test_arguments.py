"""Numbers that cannot be meant are refused by every class, before anything is computed."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import influence_kit
from influence_kit.core.arguments import (
    check_count,
    check_number,
    is_finite_number,
    is_one_number,
)
from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation import half_subsets, neighbor_disagreement, ridge_leave_one_out

X, Y = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 2
DATA = TensorDataset(X, Y)
NO_COUNT = [0, -1, 1.5, 2.0, True, math.nan, math.inf, "3", [2]]
NO_NUMBER = [math.nan, math.inf, -math.inf, True, "0.1", 1j, [0.1]]

COUNTS = {
    "CGInfluenceFunction": ["max_iter"],
    "LiSSAInfluenceFunction": ["recursion_depth", "num_repeat", "hessian_batch_size"],
    "NystromInfluenceFunction": ["rank"],
    "ArnoldiInfluenceFunction": ["arnoldi_dim", "projection_dim"],
    "NaiveInfluenceFunction": ["projection_dim"],
    "LoGra": ["projection_dim"],
    "TracInCPRandProj": ["projection_dim"],
    "GraSS": ["projection_dim", "blow_up"],
    "FactGraSS": ["projection_dim", "blow_up"],
    "TRAK": ["projection_dim"],
    "KNNShapley": ["n_neighbors"],
    "RepresenterPointSelection": ["max_iter"],
    "TracInCPFastRandProj": ["projection_dim"],
    "TracInCP": ["batch_size"],
}
# with what is not allowed beside what is no number
NUMBERS = {
    "ExplicitInfluenceFunction": {"damping": [-1]},
    "CGInfluenceFunction": {"damping": [-1], "tol": [-1e-3]},
    "LiSSAInfluenceFunction": {"damping": [-1], "scale": [0, -1]},
    "NystromInfluenceFunction": {"damping": [-1]},
    "DataInf": {"damping": [-1]},
    "KFACInfluenceFunction": {"damping": [-1], "rtol": [-1, 1]},
    "EKFACInfluenceFunction": {"damping": [-1], "rtol": [-1, 1]},
    "LoGra": {"damping": [-1]},
    "GraSS": {"damping": [-1]},
    "FactGraSS": {"damping": [-1]},
    "TRAK": {"ridge": [-1]},
    "NaiveInfluenceFunction": {"hessian_reg": [-1], "hessian_inverse_tol": [-1]},
    "ArnoldiInfluenceFunction": {
        "hessian_reg": [-1],
        "hessian_inverse_tol": [-1],
        "arnoldi_tol": [-1],
    },
    "RepresenterPointSelection": {"l2": [0, -1], "tol": [0, -1, 1]},
}
SEEDED = ["EKFACInfluenceFunction", "LoGra", "TRAK", "TracInCPRandProj", "ArnoldiInfluenceFunction"]


def make(name: str, **kwargs: Any) -> Any:
    model = nn.Sequential(nn.Linear(3, 2))
    args: tuple[Any, ...] = (model, DATA, [model.state_dict()])
    if name in ("RepresenterPointSelection", "TracInCPFastRandProj"):
        args = (model, "0", DATA, [model.state_dict()])
    elif name in ("NaiveInfluenceFunction", "ArnoldiInfluenceFunction"):
        args = (model, DATA, model.state_dict())
    if name not in ("TRAK", "KNNShapley"):
        kwargs["loss_fn"] = nn.CrossEntropyLoss()
    return getattr(influence_kit, name)(*args, **kwargs)


@pytest.mark.filterwarnings("ignore:WARNING")
@pytest.mark.parametrize("value", NO_COUNT)
@pytest.mark.parametrize(
    ("name", "argument"), [(name, a) for name, arguments in COUNTS.items() for a in arguments]
)
def test_counts(name: str, argument: str, value: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=f"`{argument}` must be a positive int"):
        make(name, **{argument: value})


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [
        (name, argument, value)
        for name, arguments in NUMBERS.items()
        for argument, more in arguments.items()
        for value in (*NO_NUMBER, *more)
    ],
)
def test_numbers(name: str, argument: str, value: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=f"`{argument}` must be"):
        make(name, **{argument: value})


@pytest.mark.parametrize("value", [-1, 1.5, True, math.nan, "0", 2**63])
@pytest.mark.parametrize("name", SEEDED)
def test_seeds(name: str, value: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="`seed` must be an int"):
        make(name, seed=value)


@pytest.mark.parametrize("value", NO_COUNT)
def test_counts_of_functions(value: Any) -> None:
    if value != 0:
        with pytest.raises(InvalidArgumentError, match="`k` "):
            neighbor_disagreement(X, Y, k=value)
        with pytest.raises(InvalidArgumentError, match=r"`count` must be|there must be at least"):
            half_subsets(4, value)


@pytest.mark.parametrize("value", [*NO_NUMBER, -1.0])
def test_numbers_of_functions(value: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="`ridge` must be a number that is not negative"):
        ridge_leave_one_out(X, Y, X[:2], value)
    if value != -1.0:
        with pytest.raises(InvalidArgumentError, match="`fraction` must be a finite number"):
            half_subsets(4, 2, fraction=value)


def test_numbers_of_other_packages_are_taken() -> None:
    assert check_count(np.int64(3), "n") == 3
    assert type(check_count(np.int64(3), "n")) is int
    assert check_number(np.float32(0.5), "x") == 0.5
    assert check_number(2, "x", least=2, most=2) == 2


def test_what_is_allowed_is_said() -> None:
    with pytest.raises(InvalidArgumentError, match=r'`n` must be an int of at least 2 or "auto"; '):
        check_count(1, "n", least=2, instead='"auto"')
    with pytest.raises(InvalidArgumentError, match="`x` must be a positive number and below 1; go"):
        check_number(1, "x", above=0, below=1)
    with pytest.raises(InvalidArgumentError, match="a finite number and above 1 and at most 2;"):
        check_number(3, "x", above=1, most=2)


def test_finite_numbers() -> None:
    numbers = (1, -2.5, np.float32(1), np.int64(3), torch.tensor(2), torch.ones(1), 2**63 - 1)
    others = (True, 2**63, 10**400, 1j, "1", None, torch.ones(2), torch.tensor(True))
    tensors = (torch.ones(1, device="meta"), torch.ones(1).to_sparse(), torch.tensor(1j))
    assert all(map(is_finite_number, numbers))
    assert not any(map(is_finite_number, (*others, *tensors, math.nan, torch.tensor(math.inf))))
    assert is_one_number(float("inf"))
