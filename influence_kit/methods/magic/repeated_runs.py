"""Takes recorded runs again on a borrowed model: for scores, and with other weights of examples.

Shapes: m test examples, n training examples, P trained parameters.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from influence_kit.core.locks import alone_with
from influence_kit.core.memory import resident_bytes, rows_within
from influence_kit.data.batches import Batch
from influence_kit.methods.magic.reverse_pass import ReversePass
from influence_kit.methods.magic.runs import Run
from influence_kit.methods.magic.step_gradient import Batched
from influence_kit.methods.magic.weighted_run import weighted_states
from influence_kit.preservation.restore import borrowed
from influence_kit.training.replay import Replay
from influence_kit.training.step_loss import StepLoss

# copies of an adjoint of a test example that are held at once
COPIES = 4
# memory of a backward pass through a backward pass, in forward passes
GRAPHS = 4


@dataclass(frozen=True)
class RepeatedRuns:
    """What it takes to repeat runs on a model.

    Args:
        model: the user's model.
        parameters: its trained parameters, by name.
        loss: the loss of a step.
        examples: returns the batch of the training examples of these indices.
        epochs: the epochs whose steps count; None for all.
        example_bytes: the memory that a forward pass keeps for one example.
    """

    model: nn.Module
    parameters: Mapping[str, nn.Parameter]
    loss: StepLoss
    examples: Callable[[Sequence[int]], Batch]
    epochs: Collection[int] | None
    example_bytes: int

    def scores(
        self, run: Run, gradients: Sequence[Tensor], n: int, tick: Callable[[], object]
    ) -> Tensor:
        """The scores ``[m, n]`` of a run.

        Args:
            run: the run.
            gradients: the test gradients ``[m, P]`` at each of its measured states.
            n: the number of training examples.
            tick: called after each step.
        """
        shares = [gradient / -run.last for gradient in gradients]
        measured = dict(zip(run.measured, map(self._by_parameter, shares), strict=True))
        scores = gradients[0].new_zeros(len(gradients[0]), n)
        with self._replaying(run) as replay:
            batched = Batched(GRAPHS * self.example_bytes * run.largest_batch)
            ReversePass(replay, batched, self.epochs, tick)(measured, scores)
        return scores

    def weighted(self, run: Run, weights: Tensor) -> list[dict[str, Tensor]]:
        """The measured states of a run with other weights ``[n]`` of its examples."""
        with self._replaying(run) as replay:
            return weighted_states(replay, weights, run.measured, self.epochs)

    def queries_at_once(self, runs: Sequence[Run]) -> int:
        """How many test examples may be carried back through a run together."""
        size = sum(p.numel() * p.element_size() for p in self.parameters.values())
        device = next((p.device for p in self.parameters.values()), torch.device("cpu"))
        tensors = 1 + max(run.slots for run in runs)
        return rows_within(resident_bytes(device), COPIES * tensors * size)

    def _by_parameter(self, gradients: Tensor) -> dict[str, Tensor]:
        """Gradients ``[m, P]`` as ``[m, *shape]``, in the precision of the parameters."""
        columns = gradients.split([p.numel() for p in self.parameters.values()], dim=1)
        return {
            name: column.reshape(len(gradients), *parameter.shape).to(parameter)
            for (name, parameter), column in zip(self.parameters.items(), columns, strict=True)
        }

    @contextmanager
    def _replaying(self, run: Run) -> Iterator[Replay]:
        """The model, borrowed for taking the steps of a run again."""
        with alone_with(self.model), borrowed(self.model, eval_mode=False):
            for parameter in self.parameters.values():
                parameter.requires_grad_(True)
            yield Replay(self.model, run.trace, run.steps, self.loss, self.examples)
