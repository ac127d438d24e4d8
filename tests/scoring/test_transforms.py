"""Norms of very small and very large gradients, against the same model in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from influence_kit import (
    CGInfluenceFunction,
    DataInf,
    ExplicitInfluenceFunction,
    GradCos,
    KFACInfluenceFunction,
    LiSSAInfluenceFunction,
    LoGra,
    TracInCPRandProj,
)
from influence_kit.errors import NonFiniteError
from influence_kit.scoring import Term, unit_norm

N, M = 9, 4
GENERATOR = torch.Generator().manual_seed(0)


class Tied(nn.Module):
    """A table that is looked up and multiplied by: a gradient that is a sum of two forms."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.table(ids))).mean(1))


def mlp() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), drawn(6)


def cnn() -> tuple[nn.Module, Tensor]:
    layers = nn.Conv2d(2, 3, 3), nn.GroupNorm(1, 3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3)
    return nn.Sequential(*layers), drawn(2, 6, 6)


def sequence() -> tuple[nn.Module, Tensor]:
    layers = nn.Linear(6, 5), nn.Tanh(), nn.Flatten(), nn.Linear(20, 3)
    return nn.Sequential(*layers), drawn(4, 6)


def lstm() -> tuple[nn.Module, Tensor]:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.LSTM(6, 4, batch_first=True), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x)[0][:, -1])

    return Last(), drawn(4, 6)


def tied() -> tuple[nn.Module, Tensor]:
    return Tied(), torch.randint(5, (N, 3), generator=GENERATOR)


def drawn(*shape: int) -> Tensor:
    return torch.randn(N, *shape, generator=GENERATOR)


MODELS = [mlp, cnn, sequence, lstm, tied]
SCALES = [1e-35, 1e-25, 1e-15, 1e15, 1e25, 1e33]


def scores(
    make: Callable[[], tuple[nn.Module, Tensor]],
    method: Any,
    dtype: torch.dtype,
    scale: float,
    own: bool = True,
) -> tuple[Tensor, Tensor]:
    """Influence and self-influence where all losses are multiplied by a number."""
    GENERATOR.manual_seed(0)
    torch.manual_seed(0)
    model, x = make()
    # the same numbers in both precisions
    model, x = model.to(dtype), x.to(dtype) if x.is_floating_point() else x
    y = torch.arange(N) % 3

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(outputs, labels, reduction="none") * scale

    found = method(model, TensorDataset(x, y), [model.state_dict()], loss_fn=loss, batch_size=4)
    influence = found.influence((x[:M], y[:M])).double()
    return influence, found.self_influence().double() if own else influence


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).abs().max()) <= 2e-4 * float(other.abs().max())
        assert float(other.abs().max()) > 0


@pytest.mark.filterwarnings("ignore:.*no gradient rule")
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("make", MODELS)
def test_cosines_do_not_depend_on_the_scale_of_the_loss(make: Any, scale: float) -> None:
    found = scores(make, GradCos, torch.float32, scale)
    assert_same(found, scores(make, GradCos, torch.float64, 1.0))
    assert torch.allclose(found[1], torch.ones(N).double(), 1e-5)


@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1e200, 1e300])
def test_cosines_in_float64(scale: float) -> None:
    found = scores(mlp, GradCos, torch.float64, scale)
    expected = scores(mlp, GradCos, torch.float64, 1.0)
    assert torch.allclose(found[0], expected[0], 1e-9)
    assert torch.allclose(found[1], expected[1], 1e-9)


RELATIVE = {
    "explicit": (ExplicitInfluenceFunction, {"damping": 0.1}),
    "explicit auto": (ExplicitInfluenceFunction, {}),
    "fisher": (ExplicitInfluenceFunction, {"damping": 0.1, "curvature": "empirical_fisher"}),
    "cg": (CGInfluenceFunction, {"damping": 0.1, "tol": 1e-7}),
    "cg auto": (CGInfluenceFunction, {}),
    "lissa": (LiSSAInfluenceFunction, {"damping": 0.1, "hessian_batch_size": None}),
    "datainf": (DataInf, {"damping": 0.1}),
    "datainf auto": (DataInf, {}),
    "logra": (LoGra, {"damping": 0.1, "projection_dim": 16}),
    "kfac": (KFACInfluenceFunction, {"damping": 0.1, "curvature": "empirical_fisher"}),
}


# of the square of such a gradient the inverse is infinite in float32
AUTO = ("datainf auto", "theta")


@pytest.mark.parametrize(
    ("kind", "relative"), [(k, r) for k in RELATIVE for r in ("l", "theta") if (k, r) != AUTO]
)
def test_relative_influence_of_small_gradients(kind: str, relative: str) -> None:
    method, settings = RELATIVE[kind]

    def made(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs, **settings, relative=relative)

    assert_same(scores(mlp, made, torch.float32, 1e-25), scores(mlp, made, torch.float64, 1e-25))


def test_what_float32_does_not_hold_is_an_error() -> None:
    def made(*args: Any, **kwargs: Any) -> Any:
        return DataInf(*args, **kwargs, relative="theta")

    with pytest.raises(
        NonFiniteError, match=r"that it is 0 in .*; use float64 or a larger damping"
    ):
        scores(mlp, made, torch.float32, 1e-25)


@pytest.mark.parametrize("scale", [1e-25, 1e-15])
@pytest.mark.parametrize("kind", [kind for kind in RELATIVE if kind != "datainf auto"])
def test_influence_of_small_gradients(kind: str, scale: float) -> None:
    """Not self-influence, which may be too small a number for float32."""
    method, settings = RELATIVE[kind]

    def made(*args: Any, **kwargs: Any) -> Any:
        # a test loss of the usual size
        return method(*args, **kwargs, **settings, test_loss_fn=nn.CrossEntropyLoss())

    found = scores(mlp, made, torch.float32, scale, own=False)[0]
    expected = scores(mlp, made, torch.float64, scale, own=False)[0]
    assert float((found - expected).abs().max()) <= 2e-4 * float(expected.abs().max())


def test_datainf_leaves_out_a_direction_of_a_large_gradient() -> None:
    """The square of the gradient overflows, and the direction counts nothing."""

    def made(*args: Any, **kwargs: Any) -> Any:
        return DataInf(*args, **kwargs, damping=0.1, test_loss_fn=nn.CrossEntropyLoss())

    found = scores(mlp, made, torch.float32, 1e22, own=False)[0]
    expected = scores(mlp, made, torch.float64, 1e22, own=False)[0]
    assert float((found - expected).abs().max()) <= 1e-3 * float(expected.abs().max())


def test_projected_gradients_of_unit_norm() -> None:
    """What LESS does: the norm of short vectors."""

    class Directions(TracInCPRandProj):
        def terms(self) -> list[Term]:
            sides = self.test_at(0, unit_norm), self.train_at(0, unit_norm)
            return [Term(*sides, weight=1.0)]

    found = scores(mlp, Directions, torch.float32, 1e-28)
    assert_same(found, scores(mlp, Directions, torch.float64, 1.0))


@pytest.mark.parametrize("relative", [None, "l", "theta"])
def test_a_zero_gradient_has_scores_of_zero(relative: Any) -> None:
    model = nn.Linear(3, 1).double()
    x, y = torch.randn(4, 3, generator=GENERATOR, dtype=torch.float64), torch.zeros(4, 1).double()
    with torch.no_grad():
        y[1] = model(x[1])
    data, loss = TensorDataset(x, y), nn.MSELoss(reduction="none")
    if relative is None:
        method: Any = GradCos(model, data, [model.state_dict()], loss_fn=loss)
    else:
        method = ExplicitInfluenceFunction(
            model, data, [model.state_dict()], loss_fn=loss, damping=0.1, relative=relative
        )
    found = method.influence((x, y))
    assert torch.equal(found[:, 1], torch.zeros(4).double())
    assert bool((found[:, 0].abs() > 0)[[0, 2, 3]].all())
    assert method.self_influence()[1] == 0


@pytest.mark.parametrize("method", [GradCos, ExplicitInfluenceFunction])
def test_a_gradient_that_is_not_finite_is_named(method: Any) -> None:
    model = nn.Linear(3, 2).double()
    x, y = torch.randn(5, 3, generator=GENERATOR, dtype=torch.float64), torch.arange(5) % 2
    x[3, 1] = torch.inf
    settings = {} if method is GradCos else {"damping": 0.1, "relative": "l"}
    if method is not GradCos:
        settings["hessian_dataset"] = TensorDataset(x[:3], y[:3])
    found = method(
        model, TensorDataset(x, y), [model.state_dict()], loss_fn=nn.CrossEntropyLoss(), **settings
    )
    with pytest.raises(NonFiniteError, match="training example 3 at 'weight'"):
        found.influence((x[:2], y[:2]))
