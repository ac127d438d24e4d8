"""The gradients of the steps of a training run, each at the weights before the step.

Shapes: P parameters, B examples of a step.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from influence_kit.checkpoints.discovery import load_checkpoint
from influence_kit.checkpoints.loader import is_live, memory_of
from influence_kit.errors import InvalidArgumentError
from influence_kit.gradients.per_example import Gradients
from influence_kit.preservation.restore import load_into
from influence_kit.training.step import Step


@dataclass(frozen=True)
class StepGradients:
    """The gradients of a step's own examples.

    Args:
        model: the model, into which the weights of each step are loaded.
        trace: the steps with their weights, "state_dict".
        steps: the same steps, checked.
        gradients: returns the gradients of the examples of a batch ``(indices [b],)``, at the
            weights that are in the model.
        rows: the largest number of examples per batch.
    """

    model: nn.Module
    trace: Sequence[Mapping[str, Any]]
    steps: Sequence[Step]
    gradients: Callable[[tuple[Tensor]], Gradients]
    rows: int

    def __call__(self, number: int) -> Tensor:
        """The gradients of a step, ``[B, P]``.

        Raises:
            InvalidArgumentError: if the state dict of the step shares memory with the model.
        """
        state = self.trace[number]["state_dict"]
        if is_live(state, memory_of(self.model)):
            raise InvalidArgumentError(
                f"the state_dict of step {number} is the model's own memory, which training has "
                "changed since; a trace needs copies: copy.deepcopy(model.state_dict())"
            )
        load_into(self.model, partial(load_checkpoint, self.model, state))
        pieces = torch.tensor(self.steps[number].indices).split(self.rows)
        return torch.cat([self.gradients((indices,)).flat() for indices in pieces])
