"""Models trained again on subsets of the training set: the ground truth of attribution.

Shapes: n training examples, m measured outputs (of test examples), S subsets, R seeds.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import groupby
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from influence_kit.core.arguments import (
    check_flag,
    check_function,
    check_seeds,
    check_text,
    shown,
)
from influence_kit.core.objects import check_path
from influence_kit.core.processes import process_count, results
from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation.arrays import Values, subset_masks
from influence_kit.evaluation.model_folder import Job, ModelFolder
from influence_kit.evaluation.recipe import (
    Measure,
    TrainFunction,
    TrainingSettings,
    TrainsMany,
    seeded,
)
from influence_kit.evaluation.train_jobs import Measurements, measured, train_group, trained

CALL = "train_fn(indices, seed) -> model"


class Retraining:
    """Trains models on subsets of the training set, and returns the outputs measured of each.

    Models are dropped once they are measured; with a ``folder`` they are also kept on disk, so that
    other outputs can be measured later, and an interrupted run continues where it stopped.

    Args:
        train_fn: ``train_fn(indices, seed) -> model``, trained on the examples at ``indices``
            (int64, ascending). Torch's random state is set by the seed before each call, and
            restored afterwards. Or a ``BatchedSGD``, which trains many small models at once.
        folder: where every finished model is kept, in one safetensors file each, which any method
            takes as a checkpoint; None keeps none. A folder of another training function, or
            of another number of examples, is refused. A second run on the same folder waits, and
            then reads.
        model: a model like those that ``train_fn`` returns, into which finished ones are loaded.
            If it is None and finished models are found, one model is trained for that.
        label: identifies the training in the folder. None takes the name and source of
            ``train_fn`` and the settings that it uses, wherever they are: arguments of partials,
            variables of enclosing scopes, attributes of objects, dataclasses, containers, small
            tensors, and the same of your own functions that it calls. Data (more than 1,000
            numbers or items) and weights are not compared. What training itself changes (a log, a
            counter) is not a setting.
        n_jobs: processes (of joblib) to train in; -1: one per core. ``train_fn`` and the measure
            are pickled.
        show_progress: a progress bar over the models.

    Raises:
        InvalidArgumentError: for no processes, or where joblib is not installed; with a folder
            and without a label for settings that cannot be described.

    Example:
        >>> x = torch.arange(6.0).view(6, 1)
        >>> def train_fn(indices, seed):
        ...     model = torch.nn.Linear(1, 1)
        ...     torch.nn.init.constant_(model.weight, float(x[indices].mean()))
        ...     torch.nn.init.zeros_(model.bias)
        ...     return model
        >>> subsets = torch.tensor([[1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1]])
        >>> Retraining(train_fn).outputs(subsets, lambda model: model(x[1:4])[:, 0]).tolist()
        [[[0.5, 1.0, 1.5]], [[4.5, 9.0, 13.5]]]
    """

    def __init__(
        self,
        train_fn: TrainFunction,
        folder: str | Path | None = None,
        *,
        model: nn.Module | None = None,
        label: str | None = None,
        n_jobs: int = 1,
        show_progress: bool = False,
    ) -> None:
        if folder is not None and (not isinstance(folder, str | PathLike) or not str(folder)):
            raise InvalidArgumentError(
                f"`folder` must be the path of a folder, or None; got {shown(folder)}"
            )
        if folder is not None:
            check_path(folder, "folder", "None")
        if model is not None and not isinstance(model, nn.Module):
            raise InvalidArgumentError(
                "`model` must be a torch.nn.Module like those that `train_fn` returns, or None; "
                f"got {shown(model)}"
            )
        self.train_fn = check_function(train_fn, "train_fn", CALL)
        self.show_progress = check_flag(show_progress, "show_progress")
        if label is not None:
            check_text(label, "label", instead="None")
        self._model = copy.deepcopy(model)
        self._path, self._label = folder, label
        self._processes = process_count(n_jobs)
        self._settings = TrainingSettings(train_fn, label)

    def outputs(self, subsets: Values, measure: Measure, seeds: Sequence[int] = (0,)) -> Tensor:
        """The measured outputs of a model for each subset and seed, float64 ``[S, R, m]``.

        Args:
            subsets: which training examples each subset has, bool ``[S, n]``.
            measure: ``measure(model) -> [m]``: margins of the test examples, say. The model is in
                evaluation mode, and gradients are off.
            seeds: one model is trained with each. Use other seeds than that of the model whose
                attribution is evaluated.

        Raises:
            InvalidArgumentError: for invalid subsets, seeds, models or outputs, or a folder of
                something else.
            NonFiniteError: if an output is NaN or infinite.
        """
        masks, each_seed = _pairs(subsets, seeds)
        rows = self.paired_outputs(masks, measure, each_seed)
        return rows.view(-1, len(set(each_seed)), rows.shape[1])

    def paired_outputs(self, subsets: Values, measure: Measure, seeds: Sequence[int]) -> Tensor:
        """The measured outputs of a model for each subset with its own seed, float64 ``[S, m]``.

        Args:
            subsets: bool ``[S, n]``; equal pairs of a subset and a seed share one model.
            measure: as in ``outputs``.
            seeds: ``[S]``.

        Raises:
            InvalidArgumentError: as in ``outputs``.
            NonFiniteError: as in ``outputs``.
        """
        check_function(measure, "measure", "measure(model) -> tensor [m]")
        masks = subset_masks(subsets)
        jobs = _jobs(masks, seeds)
        rows = self._run(jobs, self._folder(masks), measure)
        found = [torch.as_tensor(rows[job.name]) for job in jobs]
        lengths = sorted({len(row) for row in found})
        if len(lengths) > 1:
            raise InvalidArgumentError(
                f"`measure` returned {lengths[0]} values for one model and {lengths[1]} for "
                "another; it must return the same number for each"
            )
        return torch.stack(found)

    def checkpoints(self, subsets: Values, seeds: Sequence[int] = (0,)) -> list[Path]:
        """The files of the models for each subset and seed, trained if they do not exist yet.

        Methods take them as their ``checkpoints``.

        Raises:
            InvalidArgumentError: without a folder; otherwise as in ``outputs``.
        """
        masks, each_seed = _pairs(subsets, seeds)
        folder = self._folder(masks)
        if folder is None:
            raise InvalidArgumentError(
                "checkpoints are files; give `Retraining` a `folder` for them"
            )
        jobs = _jobs(masks, each_seed)
        self._run(jobs, folder, measure=None)
        return [folder.file(job) for job in jobs]

    def _folder(self, masks: Tensor) -> ModelFolder | None:
        if self._path is None:
            return None
        examples = masks.shape[1]
        return ModelFolder(self._path, {"examples": examples, **self._settings.description()})

    def _run(
        self, jobs: list[Job], folder: ModelFolder | None, measure: Measure | None
    ) -> Measurements:
        """The measured outputs of each job, by its name."""
        jobs = list({job.name: job for job in jobs}.values())
        rows: Measurements = {}
        is_done = folder is None or all(map(folder.has, jobs))
        alone = nullcontext() if folder is None or is_done else folder.writing()
        bar = tqdm(desc="Retraining", total=len(jobs), disable=not self.show_progress)
        with bar, alone:
            for found in self._finished(jobs, folder, measure):
                rows.update(found)
                bar.update()
            missing = [job for job in jobs if job.name not in rows]
            for found in self._train(missing, folder, measure):
                rows.update(found)
                bar.update(len(found))
        if folder is not None:
            self._settings.after_training()
        return rows

    def _finished(
        self, jobs: list[Job], folder: ModelFolder | None, measure: Measure | None
    ) -> Iterator[Measurements]:
        """The measured outputs of the models that are on disk."""
        if folder is None or not any(map(folder.has, jobs)):
            return
        model = None if measure is None else self._skeleton(jobs, folder)
        for job in filter(folder.has, jobs):
            if model is None or measure is None:
                yield {job.name: None}
            else:
                yield {job.name: measured(folder.read(job, model), measure, job)}

    def _skeleton(self, jobs: list[Job], folder: ModelFolder) -> nn.Module:
        """A model into which weights are loaded; without a given one, one is trained."""
        if self._model is None and isinstance(self.train_fn, TrainsMany):
            with seeded(0):
                self._model = self.train_fn.make_model()
        elif self._model is None:
            job = next((job for job in jobs if not folder.has(job)), jobs[0])
            (model,) = trained(self.train_fn, [job])
            if not folder.has(job):
                folder.write(job, model)
            # the function may return the same object again
            self._model = copy.deepcopy(model)
        return self._model

    def _train(
        self, jobs: list[Job], folder: ModelFolder | None, measure: Measure | None
    ) -> Iterable[Measurements]:
        tasks = ((self.train_fn, group, folder, measure) for group in self._groups(jobs))
        return results(train_group, tasks, self._processes, ordered=False)

    def _groups(self, jobs: list[Job]) -> Iterator[list[Job]]:
        """The jobs that are trained at once: subsets of one size."""
        if not isinstance(self.train_fn, TrainsMany):
            yield from ([job] for job in jobs)
            return
        ordered = sorted(jobs, key=lambda job: len(job.indices))
        for size, same in groupby(ordered, key=lambda job: len(job.indices)):
            group = list(same)
            # every process gets work
            share = -(-len(group) // self._processes)
            step = min(self.train_fn.at_once_of(size), share)
            yield from (group[start : start + step] for start in range(0, len(group), step))


def as_retraining(train: TrainFunction | Retraining) -> Retraining:
    """A training function as a ``Retraining`` that keeps nothing on disk."""
    if isinstance(train, Retraining):
        return train
    return Retraining(check_function(train, "train", CALL))


def _pairs(subsets: Values, seeds: Sequence[int]) -> tuple[Tensor, list[int]]:
    """Each subset with each seed, those of a subset in a row."""
    seeds = check_seeds(seeds)
    if len({*seeds}) < len(seeds):
        raise InvalidArgumentError(
            f"got the seeds {seeds}, which must be distinct: equal seeds train the same model"
        )
    masks = subset_masks(subsets)
    return masks.repeat_interleave(len(seeds), dim=0), [*seeds] * len(masks)


def _jobs(masks: Tensor, seeds: Sequence[int]) -> list[Job]:
    seeds = check_seeds(seeds)
    if len(seeds) != len(masks):
        raise InvalidArgumentError(
            f"got {len(seeds)} seeds for {len(masks)} models; there must be one for each"
        )
    return [Job.of(mask, seed) for mask, seed in zip(masks, seeds, strict=True)]
