"""The moments of Adam and AdamW that were saved with a checkpoint."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from influence_kit.checkpoints.discovery import label_of
from influence_kit.checkpoints.optimizer_order import indices_by_name
from influence_kit.core.arguments import is_finite_number, shown
from influence_kit.core.dtypes import real
from influence_kit.errors import InvalidArgumentError
from influence_kit.learning_rates.accelerate_folder import accelerate_state
from influence_kit.learning_rates.combined_file import wrapped_state
from influence_kit.learning_rates.state_checks import DamagedState
from influence_kit.learning_rates.trainer_folder import TRAINER_STATE, trainer_state, trainer_steps
from influence_kit.storage.torch_files import values_of

FIRST, SECOND, STEP = "exp_avg", "exp_avg_sq", "step"
# settings that the groups of Adam and AdamW have; those of RAdam, NAdam and Adamax lack the last
SETTINGS = ("betas", "eps", "amsgrad")
State = Mapping[str, Any]
SAVED = 'save {"state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}'


@dataclass(frozen=True)
class Moments:
    """The state of one parameter after ``step`` steps.

    Args:
        first: the running mean of the gradients, "exp_avg", in the parameter's shape; None stands
            for zeros, of a parameter that had no gradient yet.
        second: the running mean of their squares, "exp_avg_sq".
        step: the number of steps.
        betas: the decay per step of both means.
        eps: added to the root of the second.
    """

    first: Tensor | None
    second: Tensor | None
    step: int
    betas: tuple[float, float]
    eps: float


def adam_moments(
    model: nn.Module, checkpoint: Any, parameter_names: Sequence[str] | None = None
) -> dict[str, Moments]:
    """The moments of each parameter that the optimizer of a checkpoint has, by name.

    Args:
        model: the model.
        checkpoint: a path or a dict with weights and an optimizer's state dict ("optimizer",
            "optimizer_state_dict", Lightning's "optimizer_states"), or a folder of Hugging Face's
            Trainer ("optimizer.pt") or of accelerate ("optimizer.bin").
        parameter_names: the names of the optimizer's parameters in its order; see
            ``AdamDirections``.

    Raises:
        InvalidArgumentError: if the checkpoint holds no optimizer or several, one that is not Adam
            or AdamW or took no steps, or one whose parameters are not those of the model.
    """
    try:
        optimizer = optimizer_of(checkpoint)
        groups, state = _checked(optimizer)
        shapes = {index: own[FIRST].shape for index, own in state.items()}
        indices = indices_by_name(model, groups, shapes, parameter_names)
    except (InvalidArgumentError, DamagedState) as error:
        raise InvalidArgumentError(
            f"the moments of Adam cannot be read from checkpoint {label_of(checkpoint)}: {error}"
        ) from error
    group_of = {index: group for group in groups for index in group["params"]}
    return {
        name: _moments(state.get(index, {}), group_of[index]) for name, index in indices.items()
    }


def _moments(own: State, group: State) -> Moments:
    betas = (float(group["betas"][0]), float(group["betas"][1]))
    step = int(own.get(STEP, 0))
    return Moments(own.get(FIRST), own.get(SECOND), step, betas, float(group["eps"]))


def optimizer_of(checkpoint: Any) -> State:
    """The state dict of the only optimizer of a checkpoint."""
    found = optimizers_of(checkpoint)
    if len(found) != 1:
        raise InvalidArgumentError(
            f"it holds the states of {len(found)} optimizers, and one is needed; {SAVED}"
        )
    return found[0]


def optimizers_of(checkpoint: Any) -> Sequence[State]:
    """The state dicts of the optimizers that a checkpoint holds."""
    if isinstance(checkpoint, Mapping):
        return wrapped_state(checkpoint, None).optimizers
    if not isinstance(checkpoint, str | Path):
        return ()
    path = Path(checkpoint)
    if not path.is_dir():
        return wrapped_state(values_of(path), path).optimizers
    if (path / TRAINER_STATE).is_file():
        return trainer_steps(path, trainer_state(path) or {}).optimizers
    return accelerate_state(path).optimizers


def _checked(optimizer: State) -> tuple[Sequence[State], dict[Any, State]]:
    """The parameter groups and the states by index, those of Adam."""
    groups, state = optimizer["param_groups"], optimizer.get("state", {})
    for group in groups:
        if not {*SETTINGS} <= {*group}:
            raise InvalidArgumentError(
                "its optimizer is not torch.optim.Adam or AdamW, whose groups have "
                f"{', '.join(SETTINGS)}: its settings are {sorted(group)}"
            )
        if group["amsgrad"] or group.get("maximize"):
            raise InvalidArgumentError(
                "its Adam has `amsgrad` or `maximize`, whose steps have another direction; use "
                "`GradCos` or `TracInCP`"
            )
        _check_settings(group)
    if not state:
        raise InvalidArgumentError(
            "its optimizer took no steps, and has no moments; use a later checkpoint"
        )
    for own in state.values():
        _check_state(own)
    return groups, dict(state)


def _check_settings(group: State) -> None:
    betas, eps = group["betas"], group["eps"]
    pair = isinstance(betas, tuple | list) and len(betas) == 2
    if not pair or not all(is_finite_number(beta) and 0 <= beta < 1 for beta in betas):
        raise DamagedState(f"betas must be two numbers from 0 to below 1; got {shown(betas)}")
    if not is_finite_number(eps) or eps < 0:
        raise DamagedState(f"eps must be a number of at least 0; got {shown(eps)}")


def _check_state(own: Any) -> None:
    tensors = [own.get(key) for key in (FIRST, SECOND)] if isinstance(own, Mapping) else []
    first, second = tensors or (None, None)
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        raise DamagedState(
            f"the state of a parameter must have the tensors {FIRST} and {SECOND}; got {shown(own)}"
        )
    # of squares: a negative one would leave its entry out of the directions in silence
    sound = real(second).is_floating_point() and bool((real(second) >= 0).all())
    sound = sound and bool(torch.isfinite(first).all()) and first.shape == second.shape
    if not sound or STEP not in own or int(own[STEP]) < 0:
        raise DamagedState(
            f"{FIRST} and {SECOND} must have one shape, {FIRST} finite entries, {SECOND} "
            f"floating-point ones of at least 0, and a {STEP} of at least 0; got shapes "
            f"{list(first.shape)} and {list(second.shape)}, {second.dtype}, {STEP} "
            f"{shown(own.get(STEP))}"
        )
