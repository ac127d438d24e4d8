"""Updates are those of torch's optimizers, and their slopes are their derivatives."""

import pytest
import torch
from contract import assert_close
from torch import nn
from torch.optim import SGD, Adam, AdamW

from influence_kit.training.clipping import Clipping
from influence_kit.training.updates import COUNT, GRADIENT, WEIGHT, transition

OPTIONS = [
    (SGD, {"lr": 0.1}),
    (SGD, {"lr": 0.1, "weight_decay": 0.2, "maximize": True}),
    (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.4, "weight_decay": 0.2}),
    (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    (Adam, {"lr": 0.1, "weight_decay": 0.2, "betas": (0.7, 0.8), "eps": 0.01}),
    (Adam, {"lr": 0.1, "amsgrad": True, "maximize": True, "eps": 0.1}),
    (Adam, {"lr": 0.1, "weight_decay": 0.2, "decoupled_weight_decay": True, "eps": 0.01}),
    (AdamW, {"lr": 0.1, "weight_decay": 0.2, "eps": 0.01}),
]
of_all = pytest.mark.parametrize(("optimizer", "options"), OPTIONS)


def drawn(seed):
    return torch.randn(5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def held_by(optimizer, parameter):
    held = optimizer.state.get(parameter, {})
    return {slot: value.clone() for slot, value in held.items() if value is not None}


def steps(optimizer, options, count=3):
    """The values before and after some steps of torch's optimizer, and its options."""
    parameter = nn.Parameter(drawn(0))
    made = optimizer([parameter], **options)
    values = []
    for number in range(count):
        held = held_by(made, parameter)
        before = {WEIGHT: parameter.detach().clone(), GRADIENT: drawn(number + 1), **held}
        parameter.grad = before[GRADIENT].clone()
        made.step()
        values.append((before, {WEIGHT: parameter.detach().clone(), **held_by(made, parameter)}))
    return values, made.param_groups[0]


@of_all
def test_an_update_is_torchs(optimizer, options):
    values, group = steps(optimizer, options)
    for before, after in values:
        found = transition(optimizer.__name__, group, before).after
        assert found.keys() == after.keys()
        for name, value in after.items():
            assert torch.allclose(found[name].double(), value.double(), rtol=1e-13, atol=0), name


@of_all
def test_slopes_are_derivatives(optimizer, options):
    values, group = steps(optimizer, options)
    for before, _ in values:
        update = transition(optimizer.__name__, group, before)
        adjoint = {n: drawn(10 + i)[None] for i, n in enumerate(update.after) if n != COUNT}
        pulled = update.pull(adjoint)
        for number, name in enumerate(n for n in before if n != COUNT):
            # second moments are small
            direction, h = drawn(20 + number) * before[name].abs(), 1e-5
            ends = [
                transition(
                    optimizer.__name__, group, {**before, name: before[name] + sign * h * direction}
                ).after
                for sign in (1, -1)
            ]
            moved = {n: (ends[0][n] - ends[1][n]) / (2 * h) for n in adjoint}
            change = sum((moved[n] * adjoint[n][0]).sum() for n in adjoint)
            own = pulled.get(name, torch.zeros(1, 5, dtype=torch.float64))
            # the slope of an accumulated maximum may be 0 in all entries
            assert torch.allclose((own[0] * direction).sum(), change, rtol=1e-6, atol=1e-10)


def test_where_no_gradient_has_come():
    """The slope of Adam's square root at 0 is infinite, but the update there has one: 1 / eps."""
    zeros = torch.zeros(2, dtype=torch.float64)
    options = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0, "maximize": False}
    update = transition("Adam", {**options, "amsgrad": False}, {WEIGHT: zeros + 1, GRADIENT: zeros})
    pulled = update.pull({WEIGHT: torch.ones(1, 2, dtype=torch.float64)})
    assert_close(pulled[GRADIENT], torch.full((1, 2), -0.1 / 1e-8, dtype=torch.float64))
    assert_close(pulled[WEIGHT], torch.ones(1, 2, dtype=torch.float64))


@pytest.mark.parametrize("most", [None, 0.5, 1e3])
def test_clipping_is_torchs_and_its_derivative(most):
    gradients = {"a": drawn(1), "b": drawn(2), "c": drawn(3)}
    leaves = {name: value.clone().requires_grad_() for name, value in gradients.items()}
    norm = torch.stack([value.norm() for value in leaves.values()]).norm()
    factor = 1.0 if most is None else (most / (norm + 1e-6)).clamp(max=1.0)
    outputs = [factor * value for value in leaves.values()]
    parameters = [nn.Parameter(torch.zeros(5, dtype=torch.float64)) for _ in leaves]
    for parameter, value in zip(parameters, gradients.values(), strict=True):
        parameter.grad = value.clone()
    if most is not None:
        nn.utils.clip_grad_norm_(parameters, most)
    clipping = Clipping(gradients, most)
    for parameter, value in zip(parameters, clipping.clipped().values(), strict=True):
        assert_close(value, parameter.grad, 1e-14)
    # the last parameter is not trained, and only adds to the norm
    vectors = torch.stack([drawn(4), drawn(5)])
    adjoint = {"a": vectors, "b": vectors + 1}
    found = clipping.pull(adjoint)
    for row in range(2):
        back = [adjoint["a"][row], adjoint["b"][row], torch.zeros_like(vectors[row])]
        expected = torch.autograd.grad(outputs, list(leaves.values()), back, retain_graph=True)
        for name, value in zip(leaves, expected, strict=True):
            own = found.get(name, torch.zeros(2, 5, dtype=torch.float64))
            assert torch.allclose(own[row], value, rtol=1e-12, atol=1e-15)
