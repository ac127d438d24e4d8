"""Training, keeping and measuring some models: the work of one process.

Shapes: m measured outputs.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from influence_kit.errors import InvalidArgumentError, NonFiniteError
from influence_kit.evaluation.model_folder import Job, ModelFolder
from influence_kit.evaluation.recipe import Measure, TrainFunction, TrainsMany, seeded

# the measured outputs of each job, by its name; None without a measure
Measurements = dict[str, np.ndarray | None]


def train_group(
    train_fn: TrainFunction,
    jobs: list[Job],
    folder: ModelFolder | None,
    measure: Measure | None,
) -> Measurements:
    """Train, keep and measure some models; where there are several processes, in one of them."""
    rows: Measurements = {}
    for job, model in zip(jobs, trained(train_fn, jobs), strict=True):
        if folder is not None:
            folder.write(job, model)
        rows[job.name] = None if measure is None else measured(model, measure, job)
    return rows


def trained(train_fn: TrainFunction, jobs: list[Job]) -> Iterator[nn.Module]:
    """The models of some jobs; those trained at once have subsets of one size."""
    if isinstance(train_fn, TrainsMany):
        yield from train_fn.train_many([job.indices for job in jobs], [job.seed for job in jobs])
        return
    for job in jobs:
        with seeded(job.seed):
            model = train_fn(job.indices.clone(), job.seed)
        if not isinstance(model, nn.Module):
            raise InvalidArgumentError(
                f"`train_fn` returned a {type(model).__name__}; it must return the trained "
                "torch.nn.Module"
            )
        yield model


def measured(model: nn.Module, measure: Measure, job: Job) -> np.ndarray:
    """The measured outputs of a model, float64 ``[m]``."""
    with seeded(job.seed), torch.no_grad():
        found = measure(model.eval())
    if not isinstance(found, Tensor) or found.dim() != 1 or len(found) == 0:
        shape = f" of shape {list(found.shape)}" if isinstance(found, Tensor) else ""
        raise InvalidArgumentError(
            f"`measure` returned a {type(found).__name__}{shape}; it must return a tensor [m], one "
            "value per test example"
        )
    # a copy, since it may be a view of weights that the next model overwrites
    values: np.ndarray = found.detach().to("cpu", torch.float64).numpy().copy()
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise NonFiniteError(
            f"output {bad[0]} of {job} is {values[bad[0]]}: its training has diverged, or the "
            "measure overflows"
        )
    return values
