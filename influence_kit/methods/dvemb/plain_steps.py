"""Whether a recorded run is what ``DVEmb`` takes: all its states, and steps of plain SGD."""

import warnings

from influence_kit.errors import InvalidArgumentError
from influence_kit.training.trace import TrainingTrace


def check_plain(trace: TrainingTrace) -> None:
    """Refuse a trace that lacks states, and warn if its steps are not those of plain SGD."""
    missing = next((n for n in range(len(trace)) if not trace.is_kept(n)), None)
    if missing is not None:
        raise InvalidArgumentError(
            f"the trace has not kept the weights before step {missing}, and DVEmb needs those of "
            'every step: record the run with TrainingTrace(keep="all"), or use `MAGIC`, which '
            "repeats the steps in between"
        )
    others = (trace.recipe(number).unlike_plain_sgd for number in range(len(trace)))
    other = next((words for words in others if words is not None), None)
    if other is not None:
        warnings.warn(
            f"{other}: DVEmb treats the steps as plain SGD steps with the recorded learning rate, "
            "and scores will be those of a training run with such steps; `MAGIC` follows the "
            "optimizer",
            stacklevel=4,
        )
