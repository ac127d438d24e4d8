"""A recorded run, repeated with other weights of its examples.

Shapes: n training examples, m test examples.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from influence_kit.checkpoints.discovery import load_checkpoint
from influence_kit.core.arguments import shown
from influence_kit.data.batches import Batch, example_count
from influence_kit.errors import InvalidArgumentError
from influence_kit.losses.loss import Loss, LossFunction
from influence_kit.preservation.restore import load_into
from influence_kit.training.replay import Replay
from influence_kit.training.step_loss import losses_alone

State = dict[str, Tensor]


def check_weights(weights: Any, n: int) -> Tensor:
    """The argument ``weights`` of n training examples.

    Raises:
        InvalidArgumentError: for anything but n finite numbers.
    """
    try:
        found = torch.as_tensor(weights)
    except (TypeError, ValueError, RuntimeError):
        found = torch.zeros(0)
    if (
        found.shape != (n,)
        or found.dtype == torch.bool
        or found.is_complex()
        or not bool(found.isfinite().all())
    ):
        raise InvalidArgumentError(
            f"`weights` must be {n} finite numbers, one for each training example; got "
            f"{shown(weights)}"
        )
    return found


def weighted_states(
    replay: Replay, weights: Tensor, after: Sequence[int], epochs: Collection[int | None] | None
) -> list[State]:
    """State dicts of a run in which the examples have other weights ``[n]``.

    Args:
        replay: the run.
        weights: the weights.
        after: the numbers of steps after which the states are wanted.
        epochs: the epochs in which the weights count; None for all.
    """
    states: dict[int, State] = {}
    replay.begin(0)
    for number, step in enumerate(replay.steps):
        replay.take(number, weights if epochs is None or step.epoch in epochs else None)
        if number + 1 in after:
            state = replay.model.state_dict()
            states[number + 1] = {name: value.detach().clone() for name, value in state.items()}
    return [states[number] for number in after]


def mean_measures(
    model: nn.Module,
    measure: tuple[Loss, LossFunction | None],
    batches: Iterable[Batch],
    states: Sequence[Mapping[str, Tensor]],
) -> Tensor:
    """The measure of each test example, ``[m]``, as a mean over states; the model is borrowed."""
    parts = []
    with torch.no_grad():
        for batch in batches:
            total: Any = 0
            for state in states:
                load_into(model, partial(load_checkpoint, model, state))
                total = total + losses_alone(model, *measure, batch)
            assert len(total) == example_count(batch)
            parts.append(total / len(states))
    return torch.cat(parts)
