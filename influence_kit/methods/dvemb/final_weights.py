"""The one checkpoint of a recorded run: the weights after training."""

from collections.abc import Sequence
from typing import Any

from influence_kit.errors import InvalidArgumentError
from influence_kit.training.trace import TrainingTrace


def weights_after_training(checkpoints: Any, trace: Any) -> Any:
    """The argument ``checkpoints``, or the weights at the end of a trace."""
    if checkpoints is not None:
        return checkpoints
    if not isinstance(trace, TrainingTrace):
        raise InvalidArgumentError(
            "`checkpoints` must be the weights after training, [state_dict]; it may be None only "
            "if `trace` is a TrainingTrace, which contains them; got None"
        )
    return [trace.final]


def check_one_checkpoint(checkpoints: Sequence[Any]) -> None:
    """Refuse several checkpoints."""
    if len(checkpoints) > 1:
        raise InvalidArgumentError(
            "`checkpoints` must be one checkpoint for DVEmb, the weights after the recorded run; "
            f"got {len(checkpoints)}"
        )
