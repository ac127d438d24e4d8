"""Many small models trained at once: plain SGD on stacked parameters, by ``torch.func.vmap``.

A small model leaves most of a processor idle: a step costs what calling its operations costs. With
B models stacked, a step of all costs little more than a step of one.

Letters: n training examples, B models trained at once, b examples a batch.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.modules.dropout import _DropoutNd

from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation.recipe import describe_function, seeded
from influence_kit.gradients.source import kept_bytes
from influence_kit.memory import resident_bytes, rows_within
from influence_kit.saved import hash_of

Stacked = dict[str, Tensor]
INSTEAD = "Give `Retraining` a function that trains one model"
# more gain nothing: by then the arithmetic takes the time
MOST_MODELS = 128
# what may be in a setting, and how that is said
RANGES = {
    "epochs": (lambda value: value >= 1, "at least 1"),
    "learning_rate": (lambda value: value > 0, "positive"),
    "batch_size": (lambda value: value >= 1, "at least 1"),
    "momentum": (lambda value: 0 <= value < 1, "at least 0 and below 1"),
    "weight_decay": (lambda value: value >= 0, "not negative"),
    "at_once": (lambda value: value == "auto" or value >= 1, 'at least 1, or "auto"'),
}


@dataclass(frozen=True, eq=False, repr=False)
class BatchedSGD:
    """A training function of plain SGD that ``Retraining`` runs for many models at once.

    For each subset and seed: torch's random state is set by the seed, ``make_model`` makes the
    model, and each epoch goes through the subset in the order of ``torch.randperm`` drawn from a
    generator of that seed, ``batch_size`` at a time (the last batch may be short), with
    ``torch.optim.SGD``. The models are those of that loop, up to rounding.

    Models that are trained at once take as many steps: subsets of other sizes are trained
    separately. Learning rate, momentum and weight decay are constant. A model that changes its
    buffers in training (BatchNorm), draws random numbers (dropout) or has operations without a
    batching rule is refused: give ``Retraining`` an ordinary training function of it.

    Args:
        make_model: makes a new model, its weights drawn from torch's random state.
        inputs: the whole training set's inputs ``[n, ...]``, on the models' device.
        targets: its targets ``[n, ...]``.
        loss_fn: ``loss_fn(outputs, targets)``, a scalar: the mean over the batch.
        epochs: passes over the subset.
        learning_rate: of every step.
        batch_size: the letter b.
        momentum: of ``torch.optim.SGD``.
        weight_decay: of ``torch.optim.SGD``: added to the gradient, times the weights.
        at_once: the letter B; "auto" takes as many as fit into memory, 128 at most.

    Raises:
        InvalidArgumentError: for settings outside their range, or a model that cannot be trained
            so.

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

    def __post_init__(self) -> None:
        """Refuse what cannot be trained, before hours of training."""
        for name, (fits, range_of) in RANGES.items():
            value = getattr(self, name)
            if not fits(value):
                raise InvalidArgumentError(f"`{name}` is {value!r}; it must be {range_of}")
        if len(self.inputs) != len(self.targets):
            raise InvalidArgumentError(
                f"got {len(self.inputs)} inputs and {len(self.targets)} targets; there must be one "
                "target an input"
            )
        with seeded(0):
            _check_model(self.make_model().train(), self.inputs[:2])
            try:
                self._train(
                    _Stack.of([self.make_model(), self.make_model()]), [torch.zeros(2, 2).long()]
                )
            except RuntimeError as error:
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
            subsets: the places of each model's training examples, all as many.
            seeds: one a model.

        Raises:
            InvalidArgumentError: for subsets of different sizes, or another number of seeds.
        """
        sizes = sorted({len(subset) for subset in subsets})
        if len(sizes) != 1 or len(subsets) != len(seeds):
            raise InvalidArgumentError(
                f"got {len(subsets)} subsets of sizes {sizes} and {len(seeds)} seeds; models that "
                "are trained at once need subsets of one size, and a seed each"
            )
        stack = _Stack.of([self._made(seed) for seed in seeds])
        self._train(stack, self._batches(subsets, seeds))
        return {n: t.detach() for n, t in {**stack.parameters, **stack.buffers}.items()}

    def train_many(self, subsets: Sequence[Tensor], seeds: Sequence[int]) -> Iterator[nn.Module]:
        """The models trained on the subsets, all of one size."""
        stacked = self.stacked(subsets, seeds)
        for place, seed in enumerate(seeds):
            model = self._made(seed)
            own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
            with torch.no_grad():
                for name, tensor in own.items():
                    tensor.copy_(stacked[name][place])
            yield model

    def at_once_of(self, size: int) -> int:
        """How many models on ``size`` examples each to train at once."""
        if self.at_once != "auto":
            return self.at_once
        model = self._made(0)
        kept = kept_bytes(model, (self.inputs[:1], self.targets[:1]))
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        # what is kept for backward, and its gradients; weights, momentum, gradients, a temporary
        each = 2 * kept * min(size, self.batch_size) + 4 * weights
        return min(MOST_MODELS, rows_within(resident_bytes(self.inputs.device), each))

    def describe(self) -> dict[str, Any]:
        """What tells this training from another: code, settings and data."""
        settings = ("epochs", "learning_rate", "batch_size", "momentum", "weight_decay")
        return {
            "make_model": describe_function(self.make_model),
            "loss_fn": describe_function(self.loss_fn),
            **{name: getattr(self, name) for name in settings},
            "data": hash_of([(self.inputs, self.targets)]),
        }

    def _made(self, seed: int) -> nn.Module:
        with seeded(seed):
            return self.make_model()

    def _batches(self, subsets: Sequence[Tensor], seeds: Sequence[int]) -> Iterator[Tensor]:
        """The examples of each step, ``[B, b]``."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        for _ in range(self.epochs):
            orders = [
                subset[torch.randperm(len(subset), generator=generator)]
                for subset, generator in zip(subsets, generators, strict=True)
            ]
            yield from torch.stack(orders).split(self.batch_size, dim=1)

    def _train(self, stack: "_Stack", batches: Iterable[Tensor]) -> None:
        """Take the steps of ``torch.optim.SGD`` in the stacked parameters, in place."""
        weights = [p for p in stack.parameters.values() if p.requires_grad]
        velocities = [torch.zeros_like(weight) for weight in weights]
        for rows in batches:
            rows = rows.to(self.inputs.device)
            gradients = self._gradients(stack, weights, self.inputs[rows], self.targets[rows])
            with torch.no_grad():
                for weight, velocity, gradient in zip(weights, velocities, gradients, strict=True):
                    if gradient is not None:  # the optimizer, too, leaves unused parameters alone
                        velocity.mul_(self.momentum).add_(gradient)
                        velocity.add_(weight, alpha=self.weight_decay)
                        weight.sub_(velocity, alpha=self.learning_rate)

    def _gradients(
        self, stack: "_Stack", weights: list[Tensor], inputs: Tensor, targets: Tensor
    ) -> Sequence[Tensor | None]:
        def loss(parameters: Stacked, buffers: Stacked, x: Tensor, y: Tensor) -> Tensor:
            return self.loss_fn(functional_call(stack.base, (parameters, buffers), (x,)), y)

        with torch.enable_grad():
            losses = vmap(loss)(stack.parameters, stack.buffers, inputs, targets)
            if losses.dim() != 1:
                raise InvalidArgumentError(
                    f"`loss_fn` returned shape {list(losses.shape[1:])} for one batch; it must "
                    "return a scalar, the mean over the batch"
                )
            # a model's loss depends on its own parameters alone: the gradient of the sum is each's
            return torch.autograd.grad(losses.sum(), weights, allow_unused=True)


class _Stack(NamedTuple):
    """Models of one kind: the first, and the parameters and buffers of all, ``[B, ...]``."""

    base: nn.Module
    parameters: Stacked
    buffers: Stacked

    @classmethod
    def of(cls, models: Sequence[nn.Module]) -> "_Stack":
        return cls(models[0].train(), *stack_module_state(list(models)))


def _check_model(model: nn.Module, few: Tensor) -> None:
    """Refuse a model that draws random numbers or changes its buffers in training."""
    for name, module in model.named_modules():
        if isinstance(module, _DropoutNd) and module.p > 0:
            raise InvalidArgumentError(
                f"layer '{name}' is {module}, which draws other numbers for models trained "
                f"together than for each alone. {INSTEAD}"
            )
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.no_grad():
        model(few)
    changed = [n for n, buffer in model.named_buffers() if not torch.equal(buffer, before[n])]
    if changed:
        raise InvalidArgumentError(
            f"training changes the buffer '{changed[0]}', as the statistics of a BatchNorm layer, "
            f"which stacked models do not share. {INSTEAD}"
        )
