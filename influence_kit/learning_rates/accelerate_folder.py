"""The applied learning rate of a folder that accelerate's ``save_state`` wrote."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from influence_kit.learning_rates.applied import TrainingState, applied_rate
from influence_kit.learning_rates.closed_forms import is_scheduler
from influence_kit.learning_rates.rate import Rate
from influence_kit.learning_rates.siblings import folders_beside, rates_of
from influence_kit.learning_rates.state_checks import of_given_states
from influence_kit.storage.torch_files import values_of

States = dict[str, Mapping[str, Any]]


@of_given_states
def accelerate_rate(path: Path) -> Rate:
    """From ``optimizer.bin`` and ``scheduler.bin``, or a scheduler registered for saving."""
    return applied_rate(accelerate_state(path)) or Rate(expected=_processes(path) > 0)


def accelerate_state(path: Path) -> TrainingState:
    """The optimizers and schedulers in a folder; for ``step_N`` or ``iter_N`` the steps, too."""
    optimizers = _held(path, _is_optimizer, "optimizer*.bin", "optimizer.pt")
    prepared = _held(path, is_scheduler, "scheduler*.bin", "scheduler.pt")
    schedulers = prepared or _held(path, is_scheduler, "custom_checkpoint_*.pkl")
    name, number = re.fullmatch(r"(.*?)(\d*)", path.name).groups()  # type: ignore[union-attr]
    of_updates = re.search(r"step|iter", name) is not None
    return TrainingState(
        list(optimizers.values()),
        list(schedulers.values()),
        ", ".join(schedulers or optimizers),
        epochs=[int(number)] if number and not of_updates else [],
        updates=int(number) if number and of_updates else None,
        # a prepared scheduler takes one step per process and update
        per_step=max(_processes(path), 1) if prepared else 1,
        others=lambda: _others(path, schedulers),
    )


def _processes(path: Path) -> int:
    return len(list(path.glob("random_states_*.pkl")))


def _is_optimizer(state: Any) -> bool:
    return "param_groups" in state


def _held(path: Path, fits: Callable[[Any], bool], *patterns: str) -> States:
    """The dicts in a folder's files that fit."""
    files = [file for pattern in patterns for file in sorted(path.glob(pattern))]
    return {file.name: held for file in files if fits(held := values_of(file))}


def _others(path: Path, schedulers: States) -> dict[int, float]:
    """The rates of neighbouring checkpoints, by number of scheduler steps."""
    file, own = next(iter(schedulers.items()))
    return rates_of([values_of(folder / file) for folder in folders_beside(path)], own)
