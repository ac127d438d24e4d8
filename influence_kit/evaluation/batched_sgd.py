"""Many small models trained at once: plain SGD on stacked parameters, by ``torch.func.vmap``.

A step of a small model costs mostly the calls of its operations. With B models stacked, one step of
all costs little more than one step of a single model.

Shapes: n training examples, B models trained at once, b examples per batch.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from influence_kit.core.arguments import (
    check_count,
    check_seed,
    check_seeds,
)
from influence_kit.core.memory import resident_bytes, rows_within
from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation.arrays import indices_in
from influence_kit.evaluation.batch_order import Part, StepParts, own_batches, shared_batches
from influence_kit.evaluation.recipe import seeded
from influence_kit.evaluation.settings import describe_function
from influence_kit.evaluation.sgd_arguments import (
    check_epochs,
    check_new_model,
    check_settings,
    check_subsets,
)
from influence_kit.evaluation.stacked_models import (
    INSTEAD,
    ModelStack,
    Stacked,
    check_model,
    put_into,
)
from influence_kit.gradients.batch_memory import kept_bytes
from influence_kit.storage.folders import hash_of

# more gain nothing: the arithmetic dominates by then
MOST_MODELS = 128


@dataclass(frozen=True, eq=False, repr=False)
class BatchedSGD:
    """A training function of plain SGD that ``Retraining`` runs for many models at once.

    For each subset and seed: torch's random state is set by the seed, ``make_model`` makes the
    model, and each epoch goes through the subset in the order of ``torch.randperm`` drawn from a
    generator of that seed, ``batch_size`` at a time (the last batch may be short), with
    ``torch.optim.SGD``. The models are those of that loop, up to rounding.

    With ``same_batches``, a seed fixes the batches of all n examples, whatever the subset. Examples
    outside the subset are left out of their batches, and the loss of the rest of a batch is
    multiplied by its share of the batch. So leaving out one example changes the contribution of
    that example alone, which makes leave-one-out far less noisy; on half of the examples, steps are
    half as long.

    Models are trained together where their subsets have the same size. Learning rate, momentum and
    weight decay are constant. A model that changes its buffers in training (BatchNorm), draws
    random numbers (dropout) or has operations without a batching rule is refused: give
    ``Retraining`` an ordinary training function instead.

    Args:
        make_model: makes a new model, its weights drawn from torch's random state.
        inputs: the whole training set's inputs ``[n, ...]``, on the models' device.
        targets: its targets ``[n, ...]``.
        loss_fn: ``loss_fn(outputs, targets)``, a scalar: the mean over the batch.
        epochs: passes over the subset.
        learning_rate: of every step.
        batch_size: b, examples per batch.
        momentum: of ``torch.optim.SGD``.
        weight_decay: of ``torch.optim.SGD``: added to the gradient, times the weights.
        at_once: B, models trained at once; "auto" takes as many as fit into memory, at most 128.
        same_batches: whether all subsets share the batches of the whole training set.

    Raises:
        InvalidArgumentError: for settings outside their range, or a model that cannot be trained
            this way.

    Example:
        >>> x, y = torch.randn(20, 4), torch.arange(20) % 3
        >>> sgd = BatchedSGD(
        ...     lambda: nn.Linear(4, 3), x, y, nn.CrossEntropyLoss(), 5, 0.1, batch_size=4
        ... )
        >>> stacked = sgd.stacked([torch.arange(10), torch.arange(10, 20)], seeds=[0, 1])
        >>> stacked["weight"].shape
        torch.Size([2, 3, 4])
    """

    make_model: Callable[[], nn.Module]
    inputs: Tensor
    targets: Tensor
    loss_fn: Callable[[Any, Tensor], Tensor]
    epochs: int
    learning_rate: float
    batch_size: int
    momentum: float = 0.0
    weight_decay: float = 0.0
    at_once: int | Literal["auto"] = "auto"
    same_batches: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be trained, before hours of training."""
        check_settings(self)
        with seeded(0):
            check_model(self._new_model().train(), self.inputs[:2])
            stack = ModelStack.of([self._new_model(), self._new_model()])
            try:
                self._gradients(stack, [Part(None, torch.zeros(2, 2).long())])
            except InvalidArgumentError:
                raise
            except (RuntimeError, TypeError, IndexError, ValueError) as error:
                raise InvalidArgumentError(
                    f"torch.func.vmap cannot train this model: {error}. {INSTEAD}"
                ) from error

    def __call__(self, indices: Tensor, seed: int) -> nn.Module:
        """The model trained on the examples at ``indices``."""
        (model,) = self.train_many([indices], [seed])
        return model

    def stacked(self, subsets: Sequence[Tensor], seeds: Sequence[int]) -> Stacked:
        """The trained parameters, and the buffers, of the models by name, ``[B, ...]``.

        Args:
            subsets: the indices of the training examples of each model, all of one length.
            seeds: one per model.

        Raises:
            InvalidArgumentError: for subsets of different sizes, or another number of seeds.
        """
        subsets, seeds = check_subsets(subsets, seeds, len(self.inputs))
        stack = ModelStack.of([self._made(seed) for seed in seeds])
        for _ in self._train(stack, subsets, seeds):
            pass
        return stack.tensors()

    def train_many(self, subsets: Sequence[Tensor], seeds: Sequence[int]) -> Iterator[nn.Module]:
        """The models trained on the subsets, all of one size."""
        seeds = check_seeds(seeds)
        stacked = self.stacked(subsets, seeds)
        for index, seed in enumerate(seeds):
            yield put_into(self._made(seed), stacked, index)

    def checkpoints(
        self, indices: Tensor, seed: int, epochs: Sequence[int]
    ) -> list[dict[str, Any]]:
        """Checkpoints of the run that trains the model of ``indices`` and ``seed``.

        Methods take them as their ``checkpoints``.

        Args:
            indices: of the training examples.
            seed: of the run.
            epochs: after which to keep a checkpoint, ascending, from 1 to the last.

        Returns:
            ``{"state_dict", "learning_rate", "epoch"}`` for each.

        Raises:
            InvalidArgumentError: for epochs that are not ascending within 1 to the last.
        """
        indices = indices_in(indices, len(self.inputs))
        epochs = check_epochs(epochs, self.epochs)
        model, kept = self._made(seed), []
        stack = ModelStack.of([self._made(seed)])
        for epoch in self._train(stack, [indices], [seed]):
            if epoch in epochs:
                state = copy.deepcopy(put_into(model, stack.tensors(), 0).state_dict())
                rate = self.learning_rate
                kept.append({"state_dict": state, "learning_rate": rate, "epoch": epoch})
            if len(kept) == len(epochs):
                break
        return kept

    def at_once_of(self, size: int) -> int:
        """How many models on ``size`` examples each to train at once."""
        check_count(size, "size")
        if self.at_once != "auto":
            return self.at_once
        model = self._made(0)
        kept = kept_bytes(model, (self.inputs[:1], self.targets[:1]))
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        # tensors kept for backward and their gradients; weights, momentum, gradients, a temporary
        each = 2 * kept * min(size, self.batch_size) + 4 * weights
        return min(MOST_MODELS, rows_within(resident_bytes(self.inputs.device), each))

    def describe(self) -> dict[str, Any]:
        """What identifies this training: code, settings and data."""
        numbers = ("epochs", "learning_rate", "batch_size", "momentum", "weight_decay")
        return {
            "make_model": describe_function(self.make_model),
            "loss_fn": describe_function(self.loss_fn),
            **{name: getattr(self, name) for name in (*numbers, "same_batches")},
            "data": hash_of([(self.inputs, self.targets)]),
        }

    def _made(self, seed: int) -> nn.Module:
        with seeded(seed):
            return self._new_model()

    def _new_model(self) -> nn.Module:
        return check_new_model(self.make_model())

    def _train(
        self, stack: ModelStack, subsets: Sequence[Tensor], seeds: Sequence[int]
    ) -> Iterator[int]:
        """Train the stacked models in place; yields each epoch's number, from 1, at its end."""
        generators = [torch.Generator().manual_seed(check_seed(seed)) for seed in seeds]
        velocities = [torch.zeros_like(weight) for weight in stack.weights]
        for epoch in range(1, self.epochs + 1):
            if self.same_batches:
                steps = shared_batches(len(self.inputs), subsets, generators, self.batch_size)
            else:
                steps = own_batches(subsets, generators, self.batch_size)
            for step in steps:
                self._take(step, stack, velocities)
            yield epoch

    def _take(self, step: StepParts, stack: ModelStack, velocities: list[Tensor]) -> None:
        """Take a step of ``torch.optim.SGD``, in place."""
        gradients = self._gradients(stack, step)
        with torch.no_grad():
            for weight, velocity, gradient in zip(
                stack.weights, velocities, gradients, strict=True
            ):
                if gradient is not None:  # SGD leaves unused parameters alone, too
                    velocity.mul_(self.momentum).add_(gradient)
                    velocity.add_(weight, alpha=self.weight_decay)
                    weight.sub_(velocity, alpha=self.learning_rate)

    def _gradients(self, stack: ModelStack, step: StepParts) -> Sequence[Tensor | None]:
        def loss(parameters: Stacked, buffers: Stacked, x: Tensor, y: Tensor) -> Tensor:
            return self.loss_fn(functional_call(stack.base, (parameters, buffers), (x,)), y)

        totals = []
        with torch.enable_grad():
            for models, rows, share in step:
                rows = rows.to(self.inputs.device)
                losses = vmap(loss)(*stack.some(models), self.inputs[rows], self.targets[rows])
                if losses.dim() != 1:
                    raise InvalidArgumentError(
                        f"`loss_fn` returned shape {list(losses.shape[1:])} for one batch; it must "
                        "return a scalar, the mean over the batch"
                    )
                totals.append(share * losses.sum())
            # each loss depends on its own parameters alone: the gradient of the sum has them all
            return torch.autograd.grad(torch.stack(totals).sum(), stack.weights, allow_unused=True)
