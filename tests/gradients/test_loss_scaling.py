"""Models in half precision, against the same weights in float32."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import influence_kit
from influence_kit import GradCos, GradDot, TracInCP
from influence_kit.gradients.loss_scaling import scaled_examples, summed_loss
from influence_kit.losses.loss import Loss

N = 40
GENERATOR = torch.Generator().manual_seed(0)
LOSS = nn.CrossEntropyLoss()


def fitted(gain: float) -> tuple[nn.Module, Tensor, Tensor]:
    """A classifier whose logits are multiplied by a number: the larger, the better it fits."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(N, 6, generator=GENERATOR.manual_seed(1)).half().float()
    with torch.no_grad():
        y = model(x).argmax(1)
        model[2].weight *= gain
        model[2].bias *= gain
    # weights that all precisions have
    return model.half().float(), x, y


def scored(name: str, precision: torch.dtype, gain: float, **kwargs: Any) -> tuple[Tensor, Tensor]:
    model, x, y = fitted(gain)
    model, x = model.to(precision), x.to(precision)
    if name != "TRAK":
        kwargs["loss_fn"] = LOSS
    made = getattr(influence_kit, name)
    method = made(model, TensorDataset(x, y), [model.state_dict()], batch_size=8, **kwargs)
    return method.influence((x[:5], y[:5])), method.self_influence()


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.abs().max())


METHODS = [
    ("GradDot", {}),
    ("EKFACInfluenceFunction", {"damping": 0.1, "curvature": "empirical_fisher"}),
    ("LoGra", {"damping": 0.1, "projection_dim": 16}),
    ("DataInf", {"damping": 0.1}),
    ("TRAK", {"projection_dim": 16, "ridge": 1.0}),
]


@pytest.mark.parametrize("gain", [1.0, 30.0, 200.0])
@pytest.mark.parametrize(("name", "kwargs"), METHODS)
def test_scores_of_float16(name: str, kwargs: dict[str, Any], gain: float) -> None:
    found, expected = (scored(name, p, gain, **kwargs) for p in (torch.float16, torch.float32))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert error(one, other) < 0.05
        assert int((one == 0).sum()) <= int((other == 0).sum())


@pytest.mark.parametrize(("name", "kwargs"), METHODS)
def test_scores_of_bfloat16_are_float32(name: str, kwargs: dict[str, Any]) -> None:
    found, expected = (scored(name, p, 1.0, **kwargs) for p in (torch.bfloat16, torch.float32))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert error(one, other) < 0.2


def test_self_influence_of_what_is_fitted_well() -> None:
    """Each example's own score, where those of one batch are ten orders of magnitude apart."""
    found, expected = (
        scored("GradDot", precision, 200.0)[1] for precision in (torch.float16, torch.float32)
    )
    assert float(expected.min() / expected.max()) < 1e-10
    assert torch.allclose(found, expected, 0.3)
    assert float(scored("GradCos", torch.float16, 200.0)[1].min()) > 0.999


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_losses_of_any_size(factor: float) -> None:
    """Their gradients are not numbers of float16: 1e-8 is one digit, and 1e6 is infinite."""
    model, x, y = fitted(1.0)

    def cosines(precision: torch.dtype) -> tuple[Tensor, Tensor]:
        own, inputs = copy.deepcopy(model).to(precision), x.to(precision)

        def loss(outputs: Tensor, labels: Tensor) -> Tensor:
            return nn.functional.cross_entropy(outputs, labels, reduction="none") * factor

        data = TensorDataset(inputs, y)
        dot = GradDot(own, data, [own.state_dict()], loss_fn=loss).influence((inputs[:5], y[:5]))
        cos = GradCos(own, data, [own.state_dict()], loss_fn=loss).influence((inputs[:5], y[:5]))
        return dot, cos

    for found, expected in zip(cosines(torch.float16), cosines(torch.float32), strict=True):
        assert error(found, expected) < 0.02


class Bare(nn.Module):
    """A parameter without a rule, and one that is in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))
        self.last = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(x * self.scale))


@pytest.mark.filterwarnings("ignore:.*no gradient rule")
@pytest.mark.parametrize("gain", [1.0, 20.0])
def test_parameters_without_a_rule(gain: float) -> None:
    _, x, _ = fitted(1.0)
    torch.manual_seed(0)
    model = Bare()
    with torch.no_grad():
        y = model(x).argmax(1)
        model.last.weight *= gain
    model = model.half().float()

    def own_scores(precision: torch.dtype) -> Tensor:
        own, inputs = copy.deepcopy(model).to(precision), x.to(precision)
        data = TensorDataset(inputs, y)
        return TracInCP(own, data, [own.state_dict()], layers=None, loss_fn=LOSS).self_influence()

    found, expected = own_scores(torch.float16), own_scores(torch.float32)
    assert error(found, expected) < 0.03
    assert bool((found > 0).all())


def test_float32_adapters_of_a_float16_model() -> None:
    model, x, y = fitted(200.0)
    frozen = copy.deepcopy(model).half().requires_grad_(False)

    class Adapted(nn.Module):
        def __init__(self, body: nn.Module, precision: torch.dtype) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.body, self.adapter = body, nn.Linear(6, 6).requires_grad_(True)
            self.precision = precision

        def forward(self, x: Tensor) -> Tensor:
            return self.body((x + 0.1 * self.adapter(x)).to(self.precision))

    found = []
    for body, precision in ((frozen, torch.float16), (model, torch.float32)):
        own = Adapted(copy.deepcopy(body).requires_grad_(False), precision)
        own.adapter.requires_grad_(True)
        dot = GradDot(own, TensorDataset(x, y), [own.state_dict()], loss_fn=LOSS)
        found.append(dot.self_influence())
    assert error(*found) < 0.05
    assert int((found[0] == 0).sum()) <= int((found[1] == 0).sum())


def test_a_loss_with_weights_in_half_precision() -> None:
    model, x, y = fitted(1.0)
    model, x = model.half(), x.half()
    loss = nn.CrossEntropyLoss(weight=torch.ones(4).half(), reduction="none")
    dot = GradDot(model, TensorDataset(x, y), [model.state_dict()], loss_fn=loss)
    assert error(dot.influence((x[:5], y[:5])), scored("GradDot", torch.float32, 1.0)[0]) < 0.05


def test_targets_in_half_precision() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2).half().float(), torch.randn(9, 3).half().float()
    y = torch.randn(9, 2).half().float()
    found = []
    for precision in (torch.float16, torch.float32):
        own, data = copy.deepcopy(model).to(precision), (x.to(precision), y.to(precision))
        dot = GradDot(own, TensorDataset(*data), [own.state_dict()], loss_fn=nn.MSELoss())
        found.append(dot.influence(data))
    assert error(*found) < 0.01


def test_a_loss_that_is_not_finite_is_not_tried_again() -> None:
    weight = torch.ones(2, dtype=torch.float16, requires_grad=True)
    total = summed_loss(weight * torch.nan, (None, torch.zeros(2)), Loss(None, None, "loss"), 2)
    found = total.gradients([weight], [weight])
    assert bool(torch.isnan(found[0]).all())


def test_each_example_has_a_scale() -> None:
    sizes = torch.tensor([1e-9, 1.0, 3e7, 0.0])

    def gradients(scales: Tensor) -> list[Tensor]:
        return [(sizes * scales).half()[:, None]]

    (found,) = scaled_examples(gradients, 4, sizes)
    assert torch.allclose(found[:, 0], sizes, 1e-3)
