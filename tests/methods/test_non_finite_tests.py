"""A test example whose gradient is NaN is named by every method, in every question."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from turns import in_turn

import influence_kit
from influence_kit.errors import CurvatureError, NonFiniteError
from influence_kit.operators.operator import Operator
from influence_kit.operators.solvers import Cholesky, conjugate_gradients, lissa

X = torch.randn(9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(9) % 2
BAD = X[:4].clone()
BAD[2, 1] = torch.nan
OF_GRADIENTS = ["TracInCP", "GradCos", "TracInCPRandProj"]
SOLVED = [
    "ExplicitInfluenceFunction",
    "CGInfluenceFunction",
    "LiSSAInfluenceFunction",
    "NystromInfluenceFunction",
    "DataInf",
    "KFACInfluenceFunction",
    "EKFACInfluenceFunction",
    "LoGra",
    "GraSS",
    "TRAK",
    "NaiveInfluenceFunction",
    "ArnoldiInfluenceFunction",
]
QUESTIONS = {
    "influence": lambda method, inputs: method.influence(inputs),
    "aggregate": lambda method, inputs: method.influence(inputs, aggregate=True),
    "top": lambda method, inputs: method.influence(inputs, k=2),
    "by layer": lambda method, inputs: method.influence_by_layer(inputs),
    "quantities": lambda method, inputs: method.compute_intermediate_quantities(inputs),
    "their sum": lambda method, inputs: method.compute_intermediate_quantities(inputs, True),
    "own": lambda method, inputs: method.self_influence(inputs),
}


def built(name: str, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    states: Any = [model.state_dict()]
    if name == "TRAK":
        kwargs["projection_dim"] = 4
    else:
        kwargs["loss_fn"] = nn.CrossEntropyLoss()
    if name in ("NaiveInfluenceFunction", "ArnoldiInfluenceFunction"):
        states = model.state_dict()
    return getattr(influence_kit, name)(model, TensorDataset(X, Y), states, **kwargs)


@in_turn("in_batches, name, question", [False, True], [*OF_GRADIENTS, *SOLVED], QUESTIONS)
def test_a_test_example_that_is_not_finite(name: str, question: str, in_batches: bool) -> None:
    inputs: Any = (BAD, Y[:4])
    if in_batches:
        inputs = DataLoader(TensorDataset(BAD, Y[:4]), batch_size=2)
    with pytest.raises(NonFiniteError, match=r"example 2"):
        QUESTIONS[question](built(name), inputs)


WITHOUT_RELATIVE = ("TRAK", "NaiveInfluenceFunction", "ArnoldiInfluenceFunction")


@pytest.mark.parametrize("name", [name for name in SOLVED if name not in WITHOUT_RELATIVE])
@pytest.mark.parametrize("relative", ["l", "theta"])
def test_a_training_example_that_is_not_finite_in_relative_influence(
    name: str, relative: str
) -> None:
    bad = X.clone()
    bad[5, 0] = torch.inf
    method = built(name, relative=relative, hessian_dataset=TensorDataset(X, Y), damping=0.1)
    method._examples.train_dataset = TensorDataset(bad, Y)
    with pytest.raises(NonFiniteError, match="training example 5"):
        method.influence((X[:2], Y[:2]))


class Diagonal(Operator):
    def __init__(self, values: torch.Tensor) -> None:
        super().__init__([len(values)], values)
        self.values = values

    def product(self, vectors: torch.Tensor) -> torch.Tensor:
        return vectors * self.values


VECTORS = torch.ones(3, 4, dtype=torch.float64)
OPERATOR = Diagonal(torch.arange(1.0, 5.0, dtype=torch.float64))


def solvers() -> list[Any]:
    return [
        lambda v: conjugate_gradients(OPERATOR, v, 0.1),
        lambda v: lissa(OPERATOR, v, 0.1, tol=1e-14, depth=10000),
        Cholesky([torch.diag(OPERATOR.values)], 0.1),
    ]


@pytest.mark.parametrize("solve", solvers())
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_solvers_refuse_a_row_that_is_not_finite(solve: Any, value: float) -> None:
    vectors = VECTORS.clone()
    vectors[1, 2] = value
    with pytest.raises(NonFiniteError, match="vector 1 of 3 to solve for is NaN or infinite"):
        solve(vectors)


@pytest.mark.parametrize("solve", solvers())
@pytest.mark.parametrize("scale", [1e-250, 1.0, 1e250])
def test_solvers_of_very_small_and_very_large_rows(solve: Any, scale: float) -> None:
    expected = VECTORS * scale / (OPERATOR.values + 0.1)
    assert torch.allclose(solve(VECTORS * scale) / scale, expected / scale, 1e-5)


def test_a_product_that_is_not_finite_is_not_a_solution() -> None:
    broken = Diagonal(torch.tensor([1.0, torch.nan]).double())
    with pytest.raises(CurvatureError, match="nan along a direction"):
        conjugate_gradients(broken, torch.ones(1, 2).double(), 0.1)
