"""Layers that do more than set a flag in ``eval()`` and ``train()``, and models of them."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Merging(nn.Linear):
    """A layer of the loralib kind: its adapter is added to the weight in ``eval()``."""

    def __init__(self, size: int, out: int, frozen: bool = True) -> None:
        super().__init__(size, out)
        self.a = nn.Parameter(torch.randn(2, size))
        self.b = nn.Parameter(torch.randn(out, 2))
        self.weight.requires_grad_(not frozen)
        self.merged = False

    def train(self, mode: bool = True) -> "Merging":
        super().train(mode)
        if mode == self.merged:
            sign = -1 if mode else 1
            self.weight.data += sign * (self.b @ self.a).data
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return F.linear(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias) + x @ self.a.T @ self.b.T


class Rounding(nn.Linear):
    """Its weight is rounded in ``eval()`` alone, and comes back in ``train()``."""

    def __init__(self, size: int, out: int) -> None:
        super().__init__(size, out)
        self.kept: Tensor | None = None

    def train(self, mode: bool = True) -> "Rounding":
        super().train(mode)
        if mode and self.kept is not None:
            self.weight.data.copy_(self.kept)
            self.kept = None
        elif not mode and self.kept is None:
            self.kept = self.weight.data.clone()
            self.weight.data.copy_((self.weight.data * 4).round() / 4)
        return self


class Prepared(nn.Linear):
    """Works in evaluation mode only with what ``eval()`` has prepared."""

    def __init__(self, size: int, out: int) -> None:
        super().__init__(size, out)
        self.gain: Tensor | None = None

    def train(self, mode: bool = True) -> "Prepared":
        super().train(mode)
        self.gain = None if mode else self.weight.detach().norm()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.training else super().forward(x) * self.gain


class Averaged(nn.Linear):
    """Puts averages in the place of its parameters in ``eval()``, and the parameters aside."""

    def __init__(self, size: int, out: int) -> None:
        super().__init__(size, out)
        self.shadow = {name: 0.5 * p.detach().double() for name, p in self.named_parameters()}
        self.backup: dict[str, Tensor] | None = None

    def train(self, mode: bool = True) -> "Averaged":
        super().train(mode)
        if mode and self.backup is not None:
            for name, parameter in self.named_parameters():
                parameter.data = self.backup[name]
            self.backup = None
        elif not mode and self.backup is None:
            self.backup = {name: p.data for name, p in self.named_parameters()}
            for name, parameter in self.named_parameters():
                parameter.data = self.shadow[name].clone()
        return self


class FrozenNorm(nn.Sequential):
    """A backbone that keeps its BatchNorm layers in evaluation mode, and counts the calls."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.calls: list[bool] = []
        self.train()

    def train(self, mode: bool = True) -> "FrozenNorm":
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.eval()
        return self


def in_training(model: nn.Module, state: dict[str, Tensor] | None = None) -> nn.Module:
    """A copy in the state of training, with the weights of a checkpoint saved there."""
    copied = copy.deepcopy(model).train()
    if state is not None:
        copied.load_state_dict(state)
    return copied


def flagged(model: nn.Module) -> nn.Module:
    """The model with its flags off, and nothing called."""
    for module in model.modules():
        module.training = False
    return model
