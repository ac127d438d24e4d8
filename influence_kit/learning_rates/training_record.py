"""The training steps before a checkpoint, read from it without its weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from influence_kit.core.arguments import is_finite_number
from influence_kit.learning_rates.accelerate_folder import accelerate_rate, accelerate_state
from influence_kit.learning_rates.applied import State, TrainingState
from influence_kit.learning_rates.combined_file import (
    OPTIMIZER_KEYS,
    SCHEDULER_KEYS,
    UPDATE_KEYS,
    wrapped_rate,
    wrapped_state,
)
from influence_kit.learning_rates.rate import NO_RATE, NONE, RATE_KEYS, Rate
from influence_kit.learning_rates.rate import stored_rate as rate_of
from influence_kit.learning_rates.state_checks import of_given_states
from influence_kit.learning_rates.trainer_folder import (
    TRAINER_STATE,
    logged_rates,
    trainer_rate,
    trainer_state,
    trainer_steps,
)
from influence_kit.storage.torch_files import values_of

MOMENTUM = "momentum"
SHOWN = (*RATE_KEYS, *UPDATE_KEYS, "epoch", MOMENTUM, *OPTIMIZER_KEYS, *SCHEDULER_KEYS)


@dataclass(frozen=True)
class TrainingRecord:
    """What is known from a checkpoint about the steps before it.

    Args:
        state: its optimizers and schedulers.
        steps: how many steps the optimizer took; None if that is not known.
        rate: the learning rate of the last of them.
        momentum: the value stored as "momentum".
        logged: other learning rates, by number of steps before them.
        total: the length of the schedule in steps, if it is known.
        found: the names of the keys or files that the checkpoint has.
    """

    state: TrainingState
    steps: int | None = None
    rate: Rate = NO_RATE
    momentum: Any = None
    logged: Mapping[int, float] = field(default_factory=dict)
    total: int | None = None
    found: Sequence[str] = ()

    @property
    def groups(self) -> list[State]:
        """The optimizer's parameter groups; empty if it was not saved."""
        return [g for held in self.state.optimizers for g in held.get("param_groups", ())]

    @property
    def known(self) -> dict[int, float]:
        """The known learning rates, by number of steps before them."""
        if self.steps is None or self.rate.kind == NONE:
            return dict(self.logged)
        return {**self.logged, self.steps - 1: self.rate.value}


@of_given_states
def record_of(checkpoint: Any) -> TrainingRecord:
    """The record of a path or a dict in memory; an empty one for anything else.

    Raises:
        InvalidArgumentError: if there are several learning rates, and none was stored explicitly.
    """
    if isinstance(checkpoint, Mapping):
        return _of_values(checkpoint)
    if not isinstance(checkpoint, str | Path):
        return _of_values({})
    path = Path(checkpoint)
    if path.suffix == ".safetensors":
        return _of_values(_metadata(path))
    if not path.is_dir():
        return _of_values(values_of(path), path)
    state = trainer_state(path)
    return _of_accelerate(path) if state is None else _of_trainer(path, state)


def _of_values(saved: State, path: Path | None = None) -> TrainingRecord:
    """The record of a dict; an array with one of the known names is taken to be a weight."""
    own = {k: v for k, v in saved.items() if not (isinstance(v, Tensor) and v.dim())}
    steps = [int(own[key]) for key in UPDATE_KEYS if is_finite_number(own.get(key))]
    return TrainingRecord(
        wrapped_state(own, path),
        steps[0] if steps else None,
        rate_of(own) or wrapped_rate(own, path),
        own.get(MOMENTUM),
        found=[key for key in SHOWN if own.get(key) is not None],
    )


def _metadata(path: Path) -> dict[str, float]:
    """The numbers in the metadata of a safetensors file."""
    if not path.is_file():  # opening a FIFO would wait for ever
        return {}
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError):
        return {}
    return {key: float(metadata[key]) for key in SHOWN if _is_number(metadata.get(key))}


def _is_number(text: str | None) -> bool:
    try:
        float(text or "")
    except ValueError:
        return False
    return True


def _of_accelerate(path: Path) -> TrainingRecord:
    state = accelerate_state(path)
    files = [f"'{path.name}'", *(["an optimizer"] if state.optimizers else [])]
    found = [*files, *(["a scheduler"] if state.schedulers else [])]
    return TrainingRecord(state, state.updates, accelerate_rate(path), found=found)


def _of_trainer(path: Path, state: Mapping[str, Any]) -> TrainingRecord:
    steps = state.get("global_step")
    logged = {s - 1: rate for s, rate in logged_rates(state).items() if s <= (steps or 0)}
    files = (TRAINER_STATE, "optimizer.pt", "scheduler.pt")
    return TrainingRecord(
        trainer_steps(path, state),
        steps,
        trainer_rate(path, state),
        logged=logged,
        total=state.get("max_steps"),
        found=[name for name in files if (path / name).is_file()],
    )
