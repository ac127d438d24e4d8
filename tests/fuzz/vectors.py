"""Parts for vectors ``[n, w]``."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from fuzz.draw import Draw
from fuzz.wrappers import Part, wrapped


def activation(draw: Draw) -> nn.Module:
    makers: dict[str, tuple[float, Any]] = {
        "tanh": (4, lambda draw: nn.Tanh()),
        "relu in place": (2, lambda draw: nn.ReLU(inplace=True)),
        "gelu": (2, lambda draw: nn.GELU()),
        "silu in place": (1, lambda draw: nn.SiLU(inplace=True)),
        "prelu": (0.5, lambda draw: nn.PReLU()),
        "dropout": (1, lambda draw: nn.Sequential(nn.Dropout(0.4), nn.Tanh())),
    }
    return draw.call(makers)


class Scale(nn.Module):
    """Bare parameters."""

    def __init__(self, w: int) -> None:
        super().__init__()
        self.factor, self.shift = nn.Parameter(torch.randn(w)), nn.Parameter(torch.randn(1, w))

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        return (x * self.factor + self.shift).tanh()


class TiedBack(nn.Module):
    """A weight used by its layer and, transposed, outside it."""

    def __init__(self, w: int) -> None:
        super().__init__()
        self.code = nn.Linear(w, 3)

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        return F.linear(self.code(x).tanh(), self.code.weight.T)


class SharedWeight(nn.Module):
    """Two layers with one weight."""

    def __init__(self, w: int) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(w, w), nn.Linear(w, w)
        self.other.weight = self.one.weight

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        return self.other(self.one(x).tanh())


class Pairs(nn.Module):
    def __init__(self, w: int, out: int) -> None:
        super().__init__()
        self.bilinear = nn.Bilinear(w, w, out)

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        return self.bilinear(x, x.tanh()) / 2


class Mixture(nn.Module):
    """Experts mixed by a gate."""

    def __init__(self, w: int) -> None:
        super().__init__()
        self.gate = nn.Linear(w, 2)
        self.experts = nn.ModuleList([nn.Linear(w, w), nn.Linear(w, w)])

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        shares = self.gate(x).softmax(-1)
        return sum(shares[..., e : e + 1] * expert(x) for e, expert in enumerate(self.experts))


class Folded(nn.Module):
    """Halves of each vector as positions, folded into the first dimension, or before it."""

    def __init__(self, w: int, how: str) -> None:
        super().__init__()
        self.layer, self.how = nn.Linear(w, w), how

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        n = len(x)
        parts = torch.stack([x, x.cos()], 1)
        if self.how == "folded":
            return self.layer(parts.view(2 * n, -1)).tanh().view(n, 2, -1).sum(1)
        if self.how == "time-first layer":
            return self.layer(parts.transpose(0, 1)).tanh().sum(0)
        return self.layer(parts.transpose(0, 1).reshape(2 * n, -1)).tanh().view(2, n, -1).sum(0)


class Scaled(nn.Linear):
    """A subclass that its class's rule does not fit."""

    def forward(self, x: Tensor) -> Tensor:
        return 1.07 * super().forward(x)


class LowRank(nn.Module):
    """A frozen layer and its adapter."""

    def __init__(self, w: int) -> None:
        super().__init__()
        self.base = nn.Linear(w, w).requires_grad_(False)
        self.down, self.up = nn.Linear(w, 2, bias=False), nn.Linear(2, w, bias=False)

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        return self.base(x) + 2.0 * self.up(self.down(x))


class Merging(nn.Linear):
    """An adapter that is added to the weight by ``eval`` and taken out by ``train`` (loralib)."""

    def __init__(self, w: int) -> None:
        super().__init__(w, w)
        self.down = nn.Parameter(torch.randn(2, w) / 2)
        self.up = nn.Parameter(torch.randn(w, 2) / 2)
        self.weight.requires_grad_(False)
        self.merged = False

    def train(self, mode: bool = True) -> "Merging":
        super().train(mode)
        if self.merged == mode:
            sign = -1 if mode else 1
            self.weight.data += sign * self.up.data @ self.down.data
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        found = F.linear(x, self.weight, self.bias)
        return found if self.merged else found + x @ self.down.T @ self.up.T


class Detached(nn.Module):
    def __init__(self, w: int) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(w, w), nn.Linear(w, w)

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        return self.one(x).tanh() + self.other(x.detach())


class Unused(nn.Module):
    """A layer that forward never calls, and a frozen one."""

    def __init__(self, w: int) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(w, w), nn.Linear(w, w)

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        return self.used(x)


class InPlace(nn.Module):
    """Arithmetic in place behind a layer."""

    def __init__(self, w: int) -> None:
        super().__init__()
        self.layer = nn.Linear(w, w)

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        found = self.layer(x)
        found += 0.5
        return found.mul_(2).tanh_()


class Outside(nn.Module):
    """A layer whose parameters are used without calling it."""

    def __init__(self, w: int) -> None:
        super().__init__()
        self.layer = nn.Linear(w, w)

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        return F.linear(x, self.layer.weight, self.layer.bias).tanh()


class Complex(nn.Module):
    """A complex parameter."""

    def __init__(self, w: int) -> None:
        super().__init__()
        self.turn = nn.Parameter(torch.randn(w, w, dtype=torch.complex128))

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        turn = self.turn.to(torch.complex64) if x.dtype is torch.float32 else self.turn
        return (x.to(turn.dtype) @ turn).abs().log1p()


def batch_norm(draw: Draw, norm: nn.Module) -> nn.Module:
    """With statistics and an affine map that tell."""
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    nn.init.normal_(norm.weight)
    return norm


def _linear(draw: Draw, w: int) -> tuple[Callable[[], nn.Module], int]:
    out, bias = draw.randint(3, 6), draw.chance(0.8)
    return lambda: Part(nn.Linear(w, out, bias=bias), activation(draw)), out


def _keeping(make: Callable[[Draw, int], nn.Module]) -> Any:
    return lambda draw, w: ((lambda: make(draw, w)), w)


def _layer(make: Callable[[Draw, int], nn.Module]) -> Any:
    return lambda draw, w: ((lambda: Part(make(draw, w))), w)


def _pairs(draw: Draw, w: int) -> tuple[Callable[[], nn.Module], int]:
    out = draw.randint(3, 5)
    return lambda: Pairs(w, out), out


def _folded(draw: Draw, w: int) -> tuple[Callable[[], nn.Module], int]:
    how = draw.one(["folded", "time-first layer", "folded time first"])
    draw.note(how)
    return lambda: Folded(w, how), w


def _scaled(draw: Draw, w: int) -> nn.Module:
    return Scaled(w, w)


def _group_norm(draw: Draw, w: int) -> nn.Module:
    return nn.GroupNorm(draw.one([g for g in range(1, w) if w % g == 0]), w)


def _complex(draw: Draw, w: int) -> nn.Module:
    draw.excuse("complex parameters")
    return Complex(w)


POINTWISE: dict[str, tuple[float, Any]] = {
    "linear": (6, _linear),
    "layer norm": (1, _layer(lambda draw, w: nn.LayerNorm(w, bias=draw.chance(0.7)))),
    "rms norm": (1, _layer(lambda draw, w: nn.RMSNorm(w))),
    "bilinear": (1, _pairs),
    "bare parameters": (1, _keeping(lambda draw, w: Scale(w))),
    "tied back": (1, _keeping(lambda draw, w: TiedBack(w))),
    "shared weight": (1, _keeping(lambda draw, w: SharedWeight(w))),
    "mixture": (1, _keeping(lambda draw, w: Mixture(w))),
    "scaled subclass": (1, _layer(_scaled)),
    "low rank": (1, _keeping(lambda draw, w: LowRank(w))),
    "merging": (0.7, _layer(lambda draw, w: Merging(w))),
    "detached": (1, _keeping(lambda draw, w: Detached(w))),
    "unused": (1, _keeping(lambda draw, w: Unused(w))),
    "in place": (1, _keeping(lambda draw, w: InPlace(w))),
    "outside its layer": (1, _keeping(lambda draw, w: Outside(w))),
    "weight norm": (0.5, _layer(lambda draw, w: parametrizations.weight_norm(nn.Linear(w, w)))),
    "complex": (0.4, _keeping(_complex)),
}
OF_VECTORS: dict[str, tuple[float, Any]] = {
    "batch norm": (1, _layer(lambda draw, w: batch_norm(draw, nn.BatchNorm1d(w)))),
    "group norm": (1, _layer(_group_norm)),
    "folded": (2, _folded),
}


def vector_part(draw: Draw, w: int) -> tuple[nn.Module, int]:
    make, out = draw.call(POINTWISE | OF_VECTORS, w)
    return wrapped(draw, make, keeps=out == w), out
