"""The gradients of a training run's steps, each at the weights before it.

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
        model: takes the weights of each step.
        trace: holds them, as "state_dict".
        steps: the same steps, checked.
        gradients: of the examples at the indices of a batch ``(indices [b],)``, at the weights that
            are in the model.
        rows: the most examples at a time.
    """

    model: nn.Module
    trace: Sequence[Mapping[str, Any]]
    steps: Sequence[Step]
    gradients: Callable[[tuple[Tensor]], Gradients]
    rows: int

    def __call__(self, number: int) -> Tensor:
        """Those of the step of that number, ``[B, P]``.

        Raises:
            InvalidArgumentError: where the state dict of the step has changed with the model.
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
