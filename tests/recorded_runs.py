"""Small training runs in float64, recorded, and the same by a plain loop with weights of examples.

The plain loop is the oracle of ``MAGIC``: it uses torch's optimizers and the loss of each example,
and nothing of the library.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, AdamW
from torch.utils.data import TensorDataset

from influence_kit import TrainingTrace

N, M = 9, 4
_GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(N, 3, generator=_GENERATOR, dtype=torch.float64)
Y = torch.arange(N) % 2
TEST = (torch.randn(M, 3, generator=_GENERATOR, dtype=torch.float64), torch.arange(M) % 2)
DATA = TensorDataset(X, Y)
# example 8 is never seen, 2 comes twice in a batch, 0 and 5 twice in an epoch
BATCHES = [[[3, 0, 5, 1], [2, 7, 2]], [[4, 6], [0, 5, 3], [5, 0]], [[1]]]
EPOCHS = [epoch for epoch, batches in enumerate(BATCHES) for _ in batches]
STEPS = len(EPOCHS)
# of a weight, for central differences
H = 2e-5


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def with_dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 6), nn.Dropout(0.4), nn.Tanh(), nn.Linear(6, 2))


class Tied(nn.Module):
    """One weight in two layers, and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again = nn.Linear(3, 3), nn.Linear(3, 3)
        self.again.weight = self.first.weight
        self.fixed, self.last = nn.Linear(3, 3), nn.Linear(3, 2)
        self.fixed.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.fixed(self.again(self.first(x).tanh())).tanh())


def two_groups(model: nn.Module) -> list[dict[str, Any]]:
    return [
        {"params": list(model[0].parameters()), "lr": 0.3},
        {"params": list(model[2].parameters()), "lr": 0.05, "weight_decay": 0.1},
    ]


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


@dataclass(frozen=True)
class Loop:
    """A way to train.

    Args:
        optimizer: its class.
        options: of the optimizer.
        build: makes the model.
        groups: gives the optimizer its parameters.
        decay: what the learning rate is multiplied by after each step.
        clip: the norm to which gradients are clipped.
        micro: the most examples of a backward pass; None for all of a step.
        reduction: whether the loss of a step is a mean or a sum.
    """

    optimizer: Any = SGD
    options: dict[str, Any] = field(default_factory=lambda: {"lr": 0.4})
    build: Callable[[], nn.Module] = mlp
    groups: Callable[[nn.Module], Any] = trainable
    decay: float = 1.0
    clip: float | None = None
    micro: int | None = None
    reduction: Any = "mean"

    def start(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = self.build().double()
        return model, self.optimizer(self.groups(model), **self.options)

    def parts(self, indices: list[int]) -> list[list[int]]:
        size = self.micro or len(indices)
        return [indices[i : i + size] for i in range(0, len(indices), size)]


LOOPS = {
    "sgd": Loop(),
    "sum": Loop(options={"lr": 0.1}, reduction="sum"),
    "weight decay": Loop(options={"lr": 0.4, "weight_decay": 0.3}),
    "momentum": Loop(options={"lr": 0.2, "momentum": 0.9}),
    "dampening": Loop(options={"lr": 0.3, "momentum": 0.8, "dampening": 0.3}),
    "nesterov": Loop(
        options={"lr": 0.2, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, decay=0.8
    ),
    "maximize": Loop(options={"lr": 0.1, "momentum": 0.5, "maximize": True}),
    "adam": Loop(Adam, {"lr": 0.05, "weight_decay": 0.1}),
    "adam, amsgrad": Loop(Adam, {"lr": 0.05, "amsgrad": True, "betas": (0.5, 0.6)}),
    "adamw": Loop(AdamW, {"lr": 0.05, "weight_decay": 0.1, "eps": 1e-6}, decay=0.7),
    "adamw, fused": Loop(AdamW, {"lr": 0.05, "fused": True, "eps": 1e-4}),
    "nesterov, one loop": Loop(
        options={"lr": 0.2, "momentum": 0.9, "nesterov": True, "foreach": True}
    ),
    "adam, maximize": Loop(Adam, {"lr": 0.02, "maximize": True, "eps": 1e-3}),
    "groups": Loop(options={"momentum": 0.9}, groups=two_groups, decay=0.9),
    "groups, adamw": Loop(AdamW, {}, groups=two_groups),
    "clipping": Loop(options={"lr": 0.6, "momentum": 0.5}, clip=0.3),
    "clipping, adam": Loop(Adam, {"lr": 0.05}, clip=0.2),
    "accumulation": Loop(options={"lr": 0.3, "momentum": 0.9}, micro=2),
    "accumulation, clipped sums": Loop(
        options={"lr": 0.1, "momentum": 0.9}, micro=2, clip=0.5, reduction="sum"
    ),
    "dropout": Loop(options={"lr": 0.3, "momentum": 0.9}, build=with_dropout),
    "dropout, accumulation": Loop(AdamW, {"lr": 0.03}, build=with_dropout, micro=2),
    "tied": Loop(options={"lr": 0.4, "momentum": 0.9}, build=Tied),
    "tied, adamw": Loop(AdamW, {"lr": 0.05}, build=Tied, clip=0.3),
}


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none")


def _steps(loop: Loop, optimizer: torch.optim.Optimizer) -> Iterator[tuple[int, list[int]]]:
    """The epoch and examples of each step, and the schedule after it."""
    for epoch, batches in enumerate(BATCHES):
        for indices in batches:
            yield epoch, indices
            for group in optimizer.param_groups:
                group["lr"] *= loop.decay


def record(
    loop: Loop, inside: Callable[..., Any] | None = None, **options: Any
) -> tuple[nn.Module, TrainingTrace]:
    """The run as a user writes it; ``inside`` is called before each step with its number."""
    model, optimizer = loop.start()
    reduction = loop.reduction
    with TrainingTrace(model, optimizer, reduction=reduction, **options) as trace:
        for number, (epoch, indices) in enumerate(_steps(loop, optimizer)):
            if inside is not None:
                inside(number, model, optimizer)
            optimizer.zero_grad()
            parts = loop.parts(indices)
            for part in parts:
                loss = F.cross_entropy(model(X[part]), Y[part], reduction=reduction)
                (loss / len(parts) if reduction == "mean" else loss).backward()
            if loop.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), loop.clip)
            micro = None if loop.micro is None else [len(part) for part in parts]
            trace.record(indices, epoch=epoch, clip_norm=loop.clip, micro_batches=micro)
            optimizer.step()
    return model, trace


def weighted(
    loop: Loop, weights: Tensor, epochs: Any = None, last: int = 1
) -> list[dict[str, Tensor]]:
    """The last states of the run with weights ``[n]`` of the examples, the end first."""
    model, optimizer = loop.start()
    states = []
    for epoch, indices in _steps(loop, optimizer):
        optimizer.zero_grad()
        parts = loop.parts(indices)
        for part in parts:
            own = weights[part] if epochs is None or epoch in epochs else torch.ones(len(part))
            total = (own * cross_entropy(model(X[part]), Y[part])).sum()
            share = len(part) * len(parts) if loop.reduction == "mean" else 1
            (total / share).backward()
        if loop.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), loop.clip)
        optimizer.step()
        states.append({name: value.clone() for name, value in model.state_dict().items()})
    return states[::-1][:last]


def measured(loop: Loop, states: list[dict[str, Tensor]]) -> Tensor:
    """The test losses ``[m]``, as a mean over states."""
    model = loop.start()[0].eval()
    losses = []
    for state in states:
        model.load_state_dict(state)
        losses.append(cross_entropy(model(TEST[0]), TEST[1]).detach())
    return torch.stack(losses).mean(0)


def central_differences(loop: Loop, **options: Any) -> Tensor:
    """Minus the derivative of the test losses in the weight of each example, ``[m, n]``."""
    columns = []
    for example in range(N):
        ends = []
        for sign in (1, -1):
            weights = torch.ones(N, dtype=torch.float64)
            weights[example] += sign * H
            ends.append(measured(loop, weighted(loop, weights, **options)))
        columns.append((ends[1] - ends[0]) / (2 * H))
    return torch.stack(columns, dim=1)
