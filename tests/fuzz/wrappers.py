"""Parts around other parts, for tensors of any shape whose first dimension is the examples.

All are called as ``part(x, mask)``; ``mask`` is ``[n, t]`` or None.
"""

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fuzz.draw import Draw


class Part(nn.Module):
    """A layer that takes no mask, as a part."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        return self.layers(x)


class Around(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part


class Residual(Around):
    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        return x + self.part(x, mask)


class Twice(Around):
    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        return self.part(self.part(x, mask).tanh(), mask)


class Parallel(nn.Module):
    def __init__(self, one: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.one, self.other = one, other

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        return self.one(x, mask) * self.other(x, mask).sigmoid()


def rows(mask: Any, index: Any) -> Any:
    return None if mask is None else mask[index]


class Sorted(Around):
    """The examples sorted by length (or by their sums), and back."""

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        key = x.detach().flatten(1).sum(1) if mask is None else mask.sum(1)
        order = key.argsort(descending=True, stable=True)
        return self.part(x[order], rows(mask, order))[order.argsort()]


class Reversed(Around):
    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        return self.part(x.flip(0), None if mask is None else mask.flip(0)).flip(0)


class InPieces(Around):
    """Two examples at a time, as where memory is short."""

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        pieces = [self.part(x[i : i + 2], rows(mask, slice(i, i + 2))) for i in range(0, len(x), 2)]
        return torch.cat(pieces)


class Interleaved(Around):
    """Each example twice, side by side, and their mean."""

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        both = torch.stack([x, 0.5 * x], 1).flatten(0, 1)
        again = None if mask is None else mask.repeat_interleave(2, 0)
        found = self.part(both, again)
        return found.unflatten(0, (len(x), 2)).mean(1)


class Stacked(Around):
    """The batch twice, one half behind the other, and the difference of the halves."""

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        again = None if mask is None else torch.cat([mask, mask])
        one, other = self.part(torch.cat([x, -0.5 * x]), again).chunk(2)
        return one - other.tanh()


class Checkpointed(Around):
    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        return checkpoint(self.part, x, mask, use_reentrant=False)


class Routed(nn.Module):
    """Each example through one of two experts, by the sign of its sum."""

    def __init__(self, one: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.experts = nn.ModuleList([one, other])

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        seen = x.detach() if mask is None else x.detach() * mask[..., None]
        side = (seen.flatten(1).sum(1) > 0).long()
        found, order = [], []
        for number, expert in enumerate(self.experts):
            index = (side == number).nonzero().flatten()
            if len(index):
                found.append(expert(x[index], rows(mask, index)))
                order.append(index)
        return torch.cat(found)[torch.cat(order).argsort()]


class Counting(Around):
    """Counts its calls and keeps its last output in plain attributes."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__(part)
        self.calls, self.sizes, self.last = 0, {"largest": 0}, None

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        self.calls += 1
        self.sizes["largest"] = max(self.sizes["largest"], len(x))
        found = self.part(x, mask)
        self.last = found.detach()
        return found


class CountingBuffer(Around):
    def __init__(self, part: nn.Module) -> None:
        super().__init__(part)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        self.calls += 1
        return self.part(x, mask)


class DrawingNumbers(Around):
    """Draws random numbers that change nothing."""

    def __init__(self, part: nn.Module, kind: str) -> None:
        super().__init__(part)
        self.kind = kind

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        if self.kind == "torch":
            torch.rand(2)
        elif self.kind == "numpy":
            np.random.rand(2)  # noqa: NPY002
        else:
            random.random()
        return self.part(x, mask)


class Caching(Around):
    """Keeps a product of its weights in evaluation mode, as serving code does."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__(part)
        self.gain = nn.Parameter(torch.randn(2))
        self.kept: Tensor | None = None

    def train(self, mode: bool = True) -> "Caching":
        self.kept = None
        return super().train(mode)

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        found = self.part(x, mask)
        if self.training:
            return found * self.gain.prod()
        if self.kept is None:
            self.kept = self.gain.prod()
        return found * self.kept


class ChangingInput(Around):
    """Doubles its input in place, the user's own tensor where it is the first part."""

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        if x.requires_grad:
            x = x.clone()
        return self.part(x.mul_(2), mask)


def _around(cls: type[Around]) -> Any:
    return lambda draw, make: cls(make())


def _drawing(draw: Draw, make: Any) -> nn.Module:
    kind = draw.one(["torch", "numpy", "python"])
    draw.note(f"draws numbers: {kind}")
    return DrawingNumbers(make(), kind)


def _caching(draw: Draw, make: Any) -> nn.Module:
    draw.excuse("a cache that autograd goes through")
    return Caching(make())


# around a part that keeps the shape or not
WRAPPERS: dict[str, tuple[float, Any]] = {
    "sorted": (3, _around(Sorted)),
    "reversed": (1, _around(Reversed)),
    "in pieces": (1, _around(InPieces)),
    "interleaved": (2, _around(Interleaved)),
    "stacked": (3, _around(Stacked)),
    "checkpointed": (1, _around(Checkpointed)),
    "routed": (2, lambda draw, make: Routed(make(), make())),
    "parallel": (2, lambda draw, make: Parallel(make(), make())),
    "counting": (1, _around(Counting)),
    "counting buffer": (1, _around(CountingBuffer)),
    "draws numbers": (1, _drawing),
    "caching": (0.5, _caching),
}
# only around what keeps the shape
KEEPING: dict[str, tuple[float, Any]] = {
    "residual": (2, _around(Residual)),
    "twice": (2, _around(Twice)),
}


def wrapped(draw: Draw, make: Any, keeps: bool, probability: float = 0.3) -> nn.Module:
    """What ``make`` makes, perhaps within a wrapper; it is made twice for two branches."""
    if not draw.chance(probability):
        return make()
    return draw.call(WRAPPERS | KEEPING if keeps else WRAPPERS, make)
