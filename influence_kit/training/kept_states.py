"""Which states of a training run are kept, and what a recorded step gives as a dict."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from torch import Tensor

from influence_kit.core.arguments import check_count
from influence_kit.core.objects import is_one_of

Keep = Literal["all", "sqrt"] | int
STEP = ("indices", "lr", "epoch", "weight_decay", "reduction")


def check_keep(keep: Any) -> Keep:
    """The argument, checked.

    Raises:
        InvalidArgumentError: for anything but "all", "sqrt" and positive ints.
    """
    if is_one_of(keep, ("all", "sqrt")):
        found: Keep = keep
        return found
    return check_count(keep, "keep", 1, '"all" or "sqrt"')


def is_kept(keep: Keep, number: int) -> bool:
    """Whether the state before step ``number`` is kept.

    With "sqrt" the steps 0, 1, 4, 9, ...: about sqrt(T) of the T steps of a run, however long it
    will be.
    """
    if keep == "sqrt":
        return math.isqrt(number) ** 2 == number
    return keep == "all" or number % int(keep) == 0


class RecordedStep(Mapping[str, Any]):
    """A step as a dict, whose ``state_dict`` is read when it is accessed.

    Args:
        metadata: what was recorded of the step.
        state: reads its state dict.
    """

    def __init__(self, metadata: Mapping[str, Any], state: Callable[[], dict[str, Tensor]]) -> None:
        self._metadata, self._state = {key: metadata[key] for key in STEP}, state

    def __getitem__(self, key: str) -> Any:
        return self._state() if key == "state_dict" else self._metadata[key]

    def __iter__(self) -> Iterator[str]:
        return iter(("state_dict", *self._metadata))

    def __len__(self) -> int:
        return 1 + len(self._metadata)
