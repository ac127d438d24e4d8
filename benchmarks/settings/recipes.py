"""How a model is trained: by mini-batches for some epochs, or to the minimum of its objective.

A recipe trains a model in place; the same weights, examples and seed give the same result.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation.recipe import seeded

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}
Loss = Callable[[Tensor, Tensor], Tensor]
# takes the epoch, from 1, the last learning rate, and the optimizer; None where there is none
AfterEpoch = Callable[[int, float, torch.optim.Optimizer | None], None]


class Recipe(Protocol):
    """A way to train: a call does so."""

    @property
    def epochs(self) -> int:
        """How often ``after_epoch`` is called."""

    @property
    def weight_decay(self) -> float:
        """The factor of half the squared norm of all parameters in the objective."""

    def __call__(
        self,
        model: nn.Module,
        examples: tuple[Tensor, Tensor],
        loss_fn: Loss,
        seed: int,
        after_epoch: AfterEpoch | None = None,
    ) -> None:
        """Train the model; it comes back in evaluation mode."""


@dataclass(frozen=True)
class WarmupCosine:
    """A schedule: straight up for a share of the training, then down to a floor by a cosine.

    Attributes:
        warmup: the share of all steps that goes up.
        floor: the factor of the learning rate at the end.
    """

    warmup: float
    floor: float

    def __call__(self, done: float) -> float:
        """The factor of the learning rate where a share (0 to 1) of the steps is done."""
        if done < self.warmup:
            return done / self.warmup
        fall = (1 + math.cos(math.pi * (done - self.warmup) / (1 - self.warmup))) / 2
        return self.floor + (1 - self.floor) * fall


@dataclass(frozen=True)
class WarmupLine(WarmupCosine):
    """The same with a straight line down."""

    def __call__(self, done: float) -> float:
        """The factor of the learning rate where a share (0 to 1) of the steps is done."""
        if done < self.warmup:
            return done / self.warmup
        return self.floor + (1 - self.floor) * (1 - done) / (1 - self.warmup)


@dataclass(frozen=True)
class MiniBatches:
    """Steps on the mean loss of a batch's examples.

    The seed draws the order of the examples in every epoch, and what dropout leaves out. The
    last batch of an epoch may be smaller.

    Attributes:
        epochs: passes over the examples.
        batch_size: examples per step.
        learning_rate: before the schedule.
        optimizer: "sgd", "adam" or "adamw".
        momentum: of SGD.
        weight_decay: as the optimizer takes it.
        betas: of Adam and AdamW.
        schedule: the factor of the learning rate where a share (0 to 1) of the steps is done, in
            the middle of each step; None for a constant learning rate.
        longest_gradient: a longer gradient is cut to this norm; None for no such limit.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    momentum: float = 0.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: WarmupCosine | None = None
    longest_gradient: float | None = None

    def __post_init__(self) -> None:
        """Refuse an optimizer that is not known."""
        if self.optimizer not in OPTIMIZERS:
            raise InvalidArgumentError(
                f"`optimizer` is {self.optimizer!r}; it must be one of {', '.join(OPTIMIZERS)}"
            )

    @property
    def is_plain_sgd(self) -> bool:
        """Whether it is SGD with a constant learning rate and whole gradients."""
        constant = self.schedule is None and self.longest_gradient is None
        return constant and self.optimizer == "sgd"

    def __call__(
        self,
        model: nn.Module,
        examples: tuple[Tensor, Tensor],
        loss_fn: Loss,
        seed: int,
        after_epoch: AfterEpoch | None = None,
    ) -> None:
        """Train the model; it comes back in evaluation mode."""
        inputs, targets = examples
        optimizer, step = self._optimizer(model), 0
        order = torch.Generator().manual_seed(seed)
        steps = self.epochs * math.ceil(len(inputs) / self.batch_size)
        model.train()
        with seeded(seed):
            for epoch in range(1, self.epochs + 1):
                for rows in torch.randperm(len(inputs), generator=order).split(self.batch_size):
                    rate = self._rate((step + 0.5) / steps)
                    self._step(model, optimizer, rate, loss_fn(model(inputs[rows]), targets[rows]))
                    step += 1
                if after_epoch is not None:
                    after_epoch(epoch, rate, optimizer)
        model.eval()

    def _rate(self, done: float) -> float:
        return self.learning_rate * (1 if self.schedule is None else self.schedule(done))

    def _step(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, rate: float, losses: Tensor
    ) -> None:
        for group in optimizer.param_groups:
            group["lr"] = rate
        losses.mean().backward()
        if self.longest_gradient is not None:
            nn.utils.clip_grad_norm_(model.parameters(), self.longest_gradient)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def _optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        own: dict[str, Any] = {"lr": self.learning_rate, "weight_decay": self.weight_decay}
        own |= {"momentum": self.momentum} if self.optimizer == "sgd" else {"betas": self.betas}
        return OPTIMIZERS[self.optimizer](model.parameters(), **own)


@dataclass(frozen=True)
class Minimum:
    """The minimum of the mean loss + weight_decay / 2 * squared norm of all parameters.

    For convex models in float64, by L-BFGS: the result depends on neither seed nor initial weights,
    so that leaving an example out has one answer.

    Attributes:
        weight_decay: above 0, so that there is one minimum.
        tolerance: the largest entry that the gradient may have at the end; much less cannot be
            told from the rounding of the objective.
        iterations: at most.
    """

    weight_decay: float
    tolerance: float = 1e-8
    iterations: int = 2000
    epochs = 1

    def __call__(
        self,
        model: nn.Module,
        examples: tuple[Tensor, Tensor],
        loss_fn: Loss,
        seed: int,
        after_epoch: AfterEpoch | None = None,
    ) -> None:
        """Train the model; it comes back in evaluation mode.

        Raises:
            RuntimeError: where the iterations do not suffice.
        """
        inputs, targets = examples
        parameters = list(model.parameters())
        optimizer = torch.optim.LBFGS(
            parameters,
            max_iter=self.iterations,
            max_eval=2 * self.iterations,
            tolerance_grad=self.tolerance,
            tolerance_change=0.0,
            history_size=20,
            line_search_fn="strong_wolfe",
        )

        def objective() -> Tensor:
            optimizer.zero_grad()
            norm = torch.stack([p.square().sum() for p in parameters]).sum()
            value = loss_fn(model(inputs), targets).mean() + 0.5 * self.weight_decay * norm
            value.backward()
            return value

        optimizer.step(objective)
        objective()
        slope = max(float(p.grad.abs().max()) for p in parameters if p.grad is not None)
        if not slope <= self.tolerance:
            raise RuntimeError(
                f"after {self.iterations} iterations the gradient still has an entry of "
                f"{slope:.1e}, above the tolerance {self.tolerance:.0e}; allow more iterations"
            )
        optimizer.zero_grad(set_to_none=True)
        model.eval()
        if after_epoch is not None:
            after_epoch(1, 1.0, None)
