"""One training step of a trace."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from typing_extensions import Self

from influence_kit.core.arguments import is_one_number, shown
from influence_kit.core.objects import is_one_of
from influence_kit.errors import InvalidArgumentError

Reduction = Literal["mean", "sum"]


@dataclass(frozen=True)
class Step:
    """A training step, without the weights before it.

    Args:
        indices: indices of the step's examples in the training set; one that is listed twice counts
            twice.
        lr: the learning rate.
        epoch: the number of the epoch, if it is known.
        weight_decay: the factor with which the weights were added to the gradient.
        reduction: whether the step used the "mean" of its examples' losses or their "sum".
    """

    indices: list[int]
    lr: float
    epoch: int | None = None
    weight_decay: float = 0.0
    reduction: Reduction = "mean"

    @classmethod
    def of(cls, step: Any, name: str, of_groups: bool = False) -> Self:
        """A step given as a dict, checked; ``name`` identifies it in errors.

        With ``of_groups``, its learning rate may be a list, one of each parameter group, of which
        the first is taken.
        """
        if not isinstance(step, Mapping) or not {"state_dict", "indices", "lr"} <= set(step):
            there = list(step) if isinstance(step, Mapping) else f"a {type(step).__name__}"
            raise InvalidArgumentError(
                f"{name} of the trace must be a dict with state_dict (before the step), indices "
                f"and lr, and, if known, epoch, weight_decay and reduction; got {there}"
            )
        reduction, epoch = step.get("reduction", "mean"), step.get("epoch")
        if not is_one_of(reduction, ("mean", "sum")):
            raise InvalidArgumentError(
                f'the reduction of {name} must be "mean" or "sum"; got {shown(reduction)}'
            )
        if epoch is not None and (isinstance(epoch, bool) or not isinstance(epoch, int)):
            raise InvalidArgumentError(f"the epoch of {name} must be an int; got {shown(epoch)}")
        lr, decay = step["lr"], step.get("weight_decay", 0.0)
        if of_groups:
            lr, decay = first_of(lr), first_of(decay)
        lr, decay = _number(lr, f"lr of {name}"), _number(decay, f"weight_decay of {name}")
        return cls(_indices(step["indices"], name), lr, epoch, decay, reduction)


def steps_of(trace: Any, count: int, of_groups: bool = False) -> list[Step]:
    """The steps of a trace over a data set of ``count`` examples; see ``Step.of``."""
    is_sequence = isinstance(trace, Sequence) and not isinstance(trace, str)
    if not is_sequence or not len(trace):
        raise InvalidArgumentError(
            "`trace` must be a TrainingTrace or a list of steps, one or more; got a "
            f"{type(trace).__name__}{' without any' if is_sequence else ''}"
        )
    steps = [Step.of(step, f"step {number}", of_groups) for number, step in enumerate(trace)]
    for number, step in enumerate(steps):
        if max(step.indices) >= count:
            raise InvalidArgumentError(
                f"step {number} of the trace used example {max(step.indices)}, but "
                f"`train_dataset` has {count} examples; pass the data that the run was trained on"
            )
    return steps


def check_epochs(epochs: Collection[int] | None, steps: Sequence[Step]) -> None:
    """Refuse epochs that the steps do not have; None means all epochs."""
    known = {step.epoch for step in steps}
    if epochs is not None and not _are_among(epochs, known):
        raise InvalidArgumentError(
            f"`epochs` must be epochs of the trace, which has {sorted(known, key=str)}; got "
            f"{shown(epochs)}"
        )


def _are_among(epochs: object, known: Collection[int | None]) -> bool:
    if not isinstance(epochs, list | tuple | set | frozenset | range) or not epochs:
        return False
    return all((e is None or type(e) is int) and e in known for e in epochs)


def first_of(setting: Any) -> Any:
    """A setting, or that of the first parameter group."""
    return setting[0] if isinstance(setting, list) else setting


def _number(value: Any, name: str) -> float:
    """A finite number."""
    if isinstance(value, list):
        raise InvalidArgumentError(
            f"the {name} must be one number; the optimizer's parameter groups have {value}: pass "
            f"`{name.partition(' ')[0]}` to `record`"
        )
    if not is_one_number(value):
        raise InvalidArgumentError(f"the {name} must be a number; got {shown(value)}")
    if not math.isfinite(float(value)):
        raise InvalidArgumentError(f"the {name} must be finite; got {float(value)}")
    return float(value)


def _indices(indices: Any, name: str) -> list[int]:
    """The indices of a step's examples, as a list."""
    try:
        tensor = torch.as_tensor(indices)
    except (TypeError, ValueError, RuntimeError):
        tensor = torch.zeros(0)
    whole = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
    if not whole or tensor.dim() != 1 or not len(tensor) or bool((tensor < 0).any()):
        raise InvalidArgumentError(
            f"the indices of {name} must be one or more indices in the training set, each an int "
            f"of at least 0; got {shown(indices)}"
        )
    found: list[int] = tensor.tolist()
    return found
