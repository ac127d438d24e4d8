"""How a user trains a model, and what identifies one way of training."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from influence_kit.core.arguments import check_seed
from influence_kit.evaluation.settings import describe_function

TrainFunction = Callable[[Tensor, int], nn.Module]
Measure = Callable[[nn.Module], Tensor]


@runtime_checkable
class TrainsMany(Protocol):
    """A training function that can also train several models at once."""

    def __call__(self, indices: Tensor, seed: int) -> nn.Module:
        """The model trained on the examples at ``indices``."""
        ...

    def make_model(self) -> nn.Module:
        """A new, untrained model."""
        ...

    def at_once_of(self, size: int) -> int:
        """How many models on ``size`` examples each to train at once."""
        ...

    def train_many(self, subsets: Sequence[Tensor], seeds: Sequence[int]) -> Iterator[nn.Module]:
        """The models trained on subsets of one size."""
        ...

    def describe(self) -> dict[str, Any]:
        """What identifies this training, in values that JSON can hold."""
        ...


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Set torch's random state by ``seed`` inside, and restore it afterwards."""
    seed = check_seed(seed)
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


class TrainingSettings:
    """What identifies a training function, as it was before training changed any of it.

    Args:
        train_fn: the function.
        label: the user's name for it; None to describe the function itself.
    """

    def __init__(self, train_fn: TrainFunction, label: str | None) -> None:
        self._train_fn, self._label = train_fn, label
        self._before: dict[str, Any] = {}
        # the values that training wrote over
        self._written: dict[str, Any] = {}

    def description(self) -> dict[str, Any]:
        """The settings now, without what training has written into them."""
        self._before = describe(self._train_fn, self._label)
        return {**self._before, **({"train_fn": self._own(self._written)} if self._written else {})}

    def _own(self, values: dict[str, Any]) -> dict[str, Any]:
        known: dict[str, Any] = self._before["train_fn"]
        return {**known, "uses": {**known["uses"], **values}}

    def after_training(self) -> None:
        """Note which values training has changed: logs and counters, which are not settings."""
        if "train_fn" not in self._before:
            return
        before = self._before["train_fn"].get("uses", {})
        now = describe(self._train_fn, self._label).get("train_fn", {}).get("uses", {})
        changed = {name: value for name, value in before.items() if now.get(name) != value}
        self._written = {**changed, **self._written}


def describe(train_fn: TrainFunction, label: str | None) -> dict[str, Any]:
    """What identifies a training function: its label, or its code and settings."""
    if label is not None:
        return {"label": label}
    if isinstance(train_fn, TrainsMany):
        return train_fn.describe()
    return {"train_fn": describe_function(train_fn)}
