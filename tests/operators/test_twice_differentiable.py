"""Second derivatives of weight norm, against central differences: torch's own are wrong."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import cross_entropy
from contract import assert_close
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import weight_norm as hooked_weight_norm
from torch.nn.utils.parametrizations import weight_norm

from influence_kit import ExplicitInfluenceFunction
from influence_kit.errors import CurvatureError
from influence_kit.operators import hessian_product
from influence_kit.operators.products import EitherMode
from influence_kit.operators.twice_differentiable import twice_differentiable

STEP, CLOSE = 1e-5, 1e-8
X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).double()
Y = torch.arange(6) % 3
NORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "rows": weight_norm,
    "columns": lambda layer: weight_norm(layer, dim=1),
    "whole": lambda layer: weight_norm(layer, dim=None),
    "hook": hooked_weight_norm,
}
each_norm = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")


def network(norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)).double()


def differences(model: nn.Module) -> Tensor:
    """The Hessian of the mean loss ``[P, P]``."""
    parameters, rows = list(model.parameters()), []

    def slope() -> Tensor:
        loss = cross_entropy(model(X), Y).mean()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])

    for parameter in parameters:
        entries = parameter.data.view(-1)
        for i in range(len(entries)):
            value, ends = float(entries[i]), []
            for at in (value + STEP, value - STEP):
                entries[i] = at
                ends.append(slope())
            entries[i] = value
            rows.append((ends[0] - ends[1]) / (2 * STEP))
    return torch.stack(rows)


@each_norm
@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_hessian_products(norm: Any, mode: Any) -> None:
    model = network(norm)
    parameters = dict(model.named_parameters())
    sizes = [p.numel() for p in parameters.values()]
    units = torch.eye(sum(sizes)).double().split(sizes, dim=1)
    vectors = {
        name: columns.reshape(-1, *p.shape)
        for (name, p), columns in zip(parameters.items(), units, strict=True)
    }

    def mean_loss(values: Any) -> Tensor:
        return cross_entropy(functional_call(model, values, (X,)), Y).mean()

    found = hessian_product(mean_loss, parameters, vectors, mode)
    matrix = torch.cat([found[name].reshape(len(units[0]), -1) for name in parameters], dim=1)
    assert_close(matrix, differences(model), CLOSE)


@each_norm
def test_influence_with_the_hessian(norm: Any) -> None:
    model, data = network(norm), torch.utils.data.TensorDataset(X, Y)
    hessian, damping = differences(model), 6.0
    slopes = torch.stack(
        [
            torch.cat(
                [
                    g.flatten()
                    for g in torch.autograd.grad(
                        cross_entropy(model(X[i : i + 1]), Y[i : i + 1]).mean(),
                        list(model.parameters()),
                    )
                ]
            )
            for i in range(len(X))
        ]
    )
    expected = slopes @ torch.linalg.inv(hessian + damping * torch.eye(len(hessian))) @ slopes.T
    with pytest.warns(UserWarning, match="no gradient rule") as said:
        found = ExplicitInfluenceFunction(
            model,
            data,
            [model.state_dict()],
            loss_fn=nn.CrossEntropyLoss(),
            curvature="hessian",
            damping=damping,
        ).influence((X, Y))
    assert_close(found, expected, CLOSE)
    assert not any("forward-mode" in str(one.message) for one in said)


@each_norm
def test_the_weights_are_those_of_torch(norm: Any) -> None:
    model = network(norm)
    expected = model(X)
    with twice_differentiable():
        assert_close(model(X), expected, 1e-14)
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_an_operation_without_a_second_derivative_is_refused(curvature: Any) -> None:
    model = nn.Linear(4, 3).double()
    method = ExplicitInfluenceFunction(
        model,
        torch.utils.data.TensorDataset(X, Y),
        [model.state_dict()],
        loss_fn=nn.MultiMarginLoss(),
        curvature=curvature,
        damping=1.0,
    )
    with pytest.raises(CurvatureError, match=r"twice in torch \(derivative for aten::multi_margin"):
        method.influence((X, Y))


def test_an_error_of_the_users_code_is_theirs() -> None:
    def product(mode: Any) -> Tensor:
        raise RuntimeError(f"theirs in {mode}")

    with pytest.raises(RuntimeError, match=r"^theirs in reverse$"):
        EitherMode("curvature is")(product)
