"""Products of curvature with vectors: forward = reverse = dense, for operations that are awkward.

Dense matrices are by ``torch.autograd.functional``, which differentiates backwards only.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import TanhMLP, TinyGPT, cross_entropy, small_cnn, token_cross_entropy
from contract import assert_close
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from influence_kit.operators import gauss_newton_product, hessian_product
from influence_kit.operators.products import forward_product

Tree = dict[str, Tensor]
N, K = 5, 3


class Recurrent(nn.Module):
    """Words through an embedding and an LSTM; the last state is classified."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.lstm, self.head = nn.Embedding(5, 3), nn.LSTM(3, 2), nn.Linear(2, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.words(ids.T))[0][-1])


class Scaled(nn.Module):
    """A scalar parameter, and one that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(4, 3), nn.Parameter(torch.tensor(1.5))
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return (self.layer(x) * self.scale).tanh()


def vectors() -> Tensor:
    return torch.randn(N, 4, dtype=torch.float64)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], Any]] = {
    "mlp": (TanhMLP, vectors, cross_entropy),
    # in-place ReLU and max-pool
    "cnn": (small_cnn, lambda: torch.randn(N, 2, 6, 6, dtype=torch.float64), cross_entropy),
    # scaled_dot_product_attention, an embedding that is tied to the head
    "gpt": (TinyGPT, lambda: torch.randint(0, 7, (N, 5)), token_cross_entropy),
    "lstm": (Recurrent, lambda: torch.randint(0, 5, (N, 4)), cross_entropy),
    "scalar": (Scaled, vectors, cross_entropy),
}
every_model = pytest.mark.parametrize("name", MODELS)
both_modes = pytest.mark.parametrize("mode", ["forward", "reverse"])


class Problem:
    """A model's parameters, its outputs and loss as functions of them, and some vectors."""

    def __init__(self, name: str) -> None:
        build, data, loss = MODELS[name]
        torch.manual_seed(0)
        self.model = build().double()
        x = data()
        self.x, targets = x, torch.randint(0, 3, (N,))
        if name == "gpt":
            targets = torch.randint(0, 7, (N, 5))
        self.parameters = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        self.vectors = {
            n: torch.randn(K, *p.shape, dtype=torch.float64) for n, p in self.parameters.items()
        }
        self.loss = lambda outputs: loss(outputs, targets).sum()

    def outputs(self, values: Tree) -> Tensor:
        return functional_call(self.model, dict(values), (self.x,))

    def unflat(self, vector: Tensor) -> Tree:
        parts = vector.split([p.numel() for p in self.parameters.values()])
        named = zip(self.parameters.items(), parts, strict=True)
        return {n: part.view_as(p) for (n, p), part in named}

    def flat(self, tree: Tree) -> Tensor:
        return torch.cat([tree[n].reshape(K, -1) for n in self.parameters], dim=1)

    @property
    def point(self) -> Tensor:
        return torch.cat([p.flatten() for p in self.parameters.values()])

    def dense_hessian(self) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return hessian(lambda v: self.loss(self.outputs(self.unflat(v))), self.point)

    def dense_gauss_newton(self) -> Tensor:
        outputs = self.outputs(self.parameters).detach()
        with sdpa_kernel(SDPBackend.MATH):
            j = jacobian(lambda v: self.outputs(self.unflat(v)), self.point)
        size = outputs.numel()
        j, h = j.reshape(size, -1), hessian(self.loss, outputs).reshape(size, size)
        return j.T @ h @ j


@every_model
@both_modes
def test_hessian_products_are_those_of_the_dense_hessian(name: str, mode: str) -> None:
    problem = Problem(name)
    found = hessian_product(
        lambda values: problem.loss(problem.outputs(values)),
        problem.parameters,
        problem.vectors,
        mode,
    )
    assert found.keys() == problem.parameters.keys()
    assert all(found[n].shape == problem.vectors[n].shape for n in found)
    expected = problem.flat(problem.vectors) @ problem.dense_hessian()
    assert_close(problem.flat(found), expected)


@every_model
@both_modes
def test_gauss_newton_products_are_those_of_the_dense_matrix(name: str, mode: str) -> None:
    problem = Problem(name)
    found = gauss_newton_product(
        lambda values: (problem.outputs(values),),
        lambda values: problem.loss(values[0]),
        problem.parameters,
        problem.vectors,
        mode,
    )
    expected = problem.flat(problem.vectors) @ problem.dense_gauss_newton()
    assert_close(problem.flat(found), expected)


@both_modes
def test_gauss_newton_of_several_outputs_has_the_cross_terms(mode: str) -> None:
    """The loss of two outputs, of which one does not depend on the parameters."""
    torch.manual_seed(0)
    a, b = torch.randn(4, 3).double(), torch.randn(2, 3).double()
    point, v = torch.randn(3).double(), torch.randn(K, 3).double()

    def outputs(values: Tree) -> tuple[Tensor, ...]:
        return (a @ values["w"]).tanh(), torch.ones(1).double(), (b @ values["w"]).exp()

    def loss(values: Any) -> Tensor:
        return (values[0].sum() * values[2].prod() * values[1]).sum() + values[0].pow(4).sum()

    j = jacobian(lambda w: torch.cat(outputs({"w": w})), point)
    h = hessian(lambda z: loss(z.split([4, 1, 2])), torch.cat(outputs({"w": point})))
    found = gauss_newton_product(outputs, loss, {"w": point}, {"w": v}, mode)
    assert_close(found["w"], v @ j.T @ h @ j)


@both_modes
def test_a_linear_function_has_the_hessian_zero(mode: str) -> None:
    point, v = torch.ones(3).double(), torch.ones(K, 3).double()
    found = hessian_product(lambda values: values["w"].sum(), {"w": point}, {"w": v}, mode)
    assert torch.equal(found["w"], torch.zeros(K, 3).double())


@both_modes
def test_products_leave_the_parameters_and_the_random_state_alone(mode: str) -> None:
    problem = Problem("mlp")
    parameters = {n: p.clone().requires_grad_() for n, p in problem.parameters.items()}
    before, state = {n: p.clone() for n, p in parameters.items()}, torch.get_rng_state()
    found = hessian_product(
        lambda values: problem.loss(problem.outputs(values)), parameters, problem.vectors, mode
    )
    assert all(not value.requires_grad for value in found.values())
    assert all(p.grad is None and torch.equal(p, before[n]) for n, p in parameters.items())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_forward_products_are_those_of_the_jacobian(mode: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    point, v = (torch.randn(shape, generator=generator).double() for shape in ((3,), (5, 3)))

    def function(values: Any) -> Tensor:
        return torch.outer(values["w"].sin(), values["w"].exp())

    jacobian = torch.autograd.functional.jacobian(lambda w: function({"w": w}), point)
    found = forward_product(function, {"w": point}, {"w": v}, mode)
    assert torch.allclose(found, torch.einsum("ijp,kp->kij", jacobian, v), atol=1e-12)
