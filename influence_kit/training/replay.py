"""Takes the steps of a recorded run again, and compares the result with what was recorded.

Shapes: n training examples, b examples of a micro-batch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from influence_kit.checkpoints.discovery import load_checkpoint
from influence_kit.data.batches import Batch, to_device
from influence_kit.errors import InvalidArgumentError
from influence_kit.preservation.module_state import set_flags
from influence_kit.preservation.restore import load_into
from influence_kit.training.forward_states import set_random_state
from influence_kit.training.optimizers import RecordedOptimizer, Slots
from influence_kit.training.step import Step
from influence_kit.training.step_loss import StepLoss
from influence_kit.training.trace import TrainingTrace

State = dict[str, Tensor]


@dataclass(frozen=True)
class Moment:
    """The state before a step: the weights of the trained parameters, the optimizer's tensors.

    And the gradients that the optimizer then got, after clipping; empty at the end of a run.
    """

    weights: State
    slots: Slots
    gradients: State = field(default_factory=dict)


class Replay:
    """The steps of a trace, taken again on the model. The model must be borrowed.

    Args:
        model: the model; its weights, flags, gradients and the random states are changed.
        trace: the recorded run.
        steps: its steps, checked.
        loss: the loss of a step.
        examples: returns the batch of the training examples of these indices.
    """

    def __init__(
        self,
        model: nn.Module,
        trace: TrainingTrace,
        steps: Sequence[Step],
        loss: StepLoss,
        examples: Callable[[Sequence[int]], Batch],
    ) -> None:
        self.model, self.trace, self.steps = model, trace, steps
        self.loss, self._examples = loss, examples
        self.recipes = [trace.recipe(number) for number in range(len(steps))]
        # of all steps, in the order of the model
        trained = {name for recipe in self.recipes for name in recipe.trained}
        self.parameters = dict(model.named_parameters())
        self.trained = [name for name in self.parameters if name in trained]
        self._optimizer = RecordedOptimizer(model)
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def segments(self) -> list[tuple[int, int]]:
        """The steps between two kept states, as ranges ``(start, stop)``."""
        starts = [number for number in range(len(self.steps)) if self.trace.is_kept(number)]
        return list(zip(starts, [*starts[1:], len(self.steps)], strict=True))

    def run(self, start: int, stop: int, weights: Tensor | None = None) -> Iterator[Moment]:
        """Take steps ``start`` to ``stop``, and give the state before each, and after the last.

        Args:
            start: the first step, whose state was kept.
            stop: the step before which to stop.
            weights: a weight ``[n]`` for each training example; None for the run as it was.
        """
        self.begin(start)
        for number in range(start, stop):
            moment = self.moment()
            self.differentiate(number, weights)
            yield replace(moment, gradients=self._gradients())
            self.move(number)
        yield self.moment()

    def begin(self, start: int) -> None:
        """Load the state before a step."""
        state = self.trace[start]["state_dict"]
        load_into(self.model, partial(load_checkpoint, self.model, state))
        self._optimizer.load(self.recipes[start], self.trace.optimizer_state(start))

    def moment(self) -> Moment:
        """A copy of the state that is in the model."""
        weights = {name: self.parameters[name].detach().clone() for name in self.trained}
        return Moment(weights, self._optimizer.slots())

    def take(self, number: int, weights: Tensor | None = None) -> None:
        """Take a step from the state that is in the model."""
        self.differentiate(number, weights)
        self.move(number)

    def differentiate(self, number: int, weights: Tensor | None = None) -> None:
        """The first half of a step: its gradients, clipped, in the model."""
        for parameter in self.parameters.values():
            parameter.grad = None
        for part, indices in enumerate(self.ready(number)):
            own = None if weights is None else weights[torch.tensor(indices)]
            self.part_loss(number, part, indices, own).backward()
        clip_norm = self.recipes[number].clip_norm
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters.values(), clip_norm)

    def move(self, number: int) -> None:
        """The second half: the optimizer's."""
        self._optimizer.step(self.recipes[number])

    def _gradients(self) -> State:
        """Copies of the gradients in the model, in which an optimizer may write."""
        return {n: p.grad.clone() for n, p in self.parameters.items() if p.grad is not None}

    def ready(self, number: int) -> list[Sequence[int]]:
        """Set the modes of modules as they were in a step; returns its micro-batches."""
        recipe = self.recipes[number]
        evaluated = set(recipe.evaluated)
        set_flags({module: name not in evaluated for name, module in self.model.named_modules()})
        return recipe.parts(self.steps[number].indices)

    def part_loss(
        self, number: int, part: int, indices: Sequence[int], weights: Tensor | None = None
    ) -> Tensor:
        """The loss of a micro-batch, as its backward pass took it.

        Args:
            number: the step.
            part: the number of the micro-batch.
            indices: of its examples.
            weights: of its examples, ``[b]``; None for the run as it was.
        """
        batch = to_device(self._examples(indices), self.device)
        reduction = self.steps[number].reduction
        parts = len(self.recipes[number].micro_batches or [0])
        state = self.trace.random_states(number).get(part)
        if state is not None:
            set_random_state(state, self.device)
        if weights is None:
            loss = self.loss.plain(batch, reduction)
        else:
            loss = self.loss.weighted(batch, reduction, weights)
        return loss / parts if reduction == "mean" and parts > 1 else loss

    def check(self, stop: int) -> None:
        """Refuse a state after step ``stop`` - 1 that is not the recorded one, bit for bit."""
        is_last = stop == len(self.steps)
        recorded = self.trace.final if is_last else self.trace[stop]["state_dict"]
        now = {name: value.detach() for name, value in self.model.state_dict().items()}
        tensors = [(name, value, now[name]) for name, value in recorded.items()]
        if not is_last:
            own = self._optimizer.slots()
            for name, held in self.trace.optimizer_state(stop).items():
                for slot, value in held.items():
                    # an optimizer that holds nothing has not taken the step
                    found = own.get(name, {}).get(slot, torch.zeros_like(value))
                    tensors.append((f"{slot} of {name}", value, found))
        for name, value, found in tensors:
            if not torch.equal(value, found.to(value.device)):
                raise _not_the_same(name, value, found.to(value.device), stop)


def _not_the_same(name: str, value: Tensor, found: Tensor, stop: int) -> InvalidArgumentError:
    largest = float((value.double() - found.double()).abs().max())
    return InvalidArgumentError(
        f"step {stop - 1}, taken again, does not give what was recorded: {name} differs by up to "
        f"{largest:.3g}. Likely causes: `train_dataset` gives other examples than those of the "
        "run (another order, changed or augmented data), another loss or reduction than the "
        "training loss, clipping or micro-batches that `record` was not told, a `record` that was "
        "not called right before the optimizer's step, dropout outside of the trace's `with` "
        "block, mixed precision, another device, number of threads or version of torch, or "
        "operations that are not deterministic"
    )
