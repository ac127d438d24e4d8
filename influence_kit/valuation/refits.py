"""The common part of all values: models fitted on parts of the training set, and means over them.

Shapes: m test examples, n training examples.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from captum.influence import DataInfluence
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from influence_kit.core.arguments import check_count, check_flag, check_function, shown
from influence_kit.core.processes import process_count, results
from influence_kit.core.summary import summary
from influence_kit.errors import InvalidArgumentError, NonFiniteError
from influence_kit.evaluation.arrays import as_tensor

Indices = NDArray[np.int64]
Marks = NDArray[np.bool_]
MOST = 2**31 - 1  # examples, seeds, samples
Fit = Callable[[np.ndarray], Any]
Score = Callable[[Any, Any], Any]


class Values(NamedTuple):
    """Estimated values of the training examples, and their standard errors.

    Attributes:
        values: float64 ``[m, n]``; one row where there is no test set, or one number per model.
        standard_errors: of the values, ``[m, n]``, from the spread of the samples; infinite where
            there is only one sample.
        counts: the number of samples that the value of each training example is the mean of, int64
            ``[n]``.
    """

    values: Tensor
    standard_errors: Tensor
    counts: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Valuation(DataInfluence):
    """Values from ``score(fit(indices), inputs)``, for many choices of indices.

    Args:
        fit: ``fit(indices)`` returns the model fitted on the training examples at ``indices``, an
            ascending int64 array. Any object may be a model. Equal indices must give equal models:
            whatever is random in ``fit`` needs a seed.
        score: ``score(model, inputs)`` returns how good a model is, higher is better: one number,
            or one per test example ``[m]``.
        train_count: n, the number of training examples.
        seed: of all random draws, which do not depend on ``n_jobs``.
        n_jobs: how many processes fit models, as joblib counts them (-1: one per core). Numbers
            other than 1 need the extra ``parallel``.
        keep_models: keep each model in memory, so that later calls do not fit it again.
    """

    fit: Fit
    score: Score
    train_count: int
    seed: int = field(default=0, kw_only=True)
    n_jobs: int = field(default=1, kw_only=True)
    keep_models: bool = field(default=False, kw_only=True)

    def __repr__(self) -> str:
        return summary(self)

    def __post_init__(self) -> None:
        check_function(self.fit, "fit", "fit(indices) -> model")
        check_function(self.score, "score", "score(model, inputs)")
        check_count(self.train_count, "train_count", most=MOST)
        check_count(self.seed, "seed", least=0, most=MOST)
        check_flag(self.keep_models, "keep_models")
        process_count(self.n_jobs)

    @cached_property
    def _models(self) -> dict[bytes, Any]:
        """The models kept, by the bytes of their indices."""
        return {}

    def _scores(self, jobs: Sequence[tuple[Indices, Any]], bar: "tqdm[Any]") -> Iterator[Tensor]:
        """For each pair of indices and inputs, the scores of the model fitted on them."""
        calls = (
            (
                self.fit,
                self.score,
                self._models.get(_key(indices)),
                indices,
                inputs,
                self.keep_models,
            )
            for indices, inputs in jobs
        )
        done = results(_fit_and_score, calls, self.n_jobs, ordered=True)
        for (indices, _), (model, scores) in zip(jobs, done, strict=True):
            if self.keep_models:
                self._models[_key(indices)] = model
            bar.update()
            yield scores

    def _bar(self, total: int, show: bool) -> "tqdm[Any]":
        """A progress bar of models; at most ``total`` are fitted."""
        check_flag(show, "show_progress")
        text = f"Using {self.get_name()} to fit models"
        return tqdm(desc=text, total=total, disable=not show)


class Moments:
    """Means of samples ``[m]`` for n examples, and standard errors, without keeping the samples."""

    def __init__(self, n: int, m: int) -> None:
        self._counts = torch.zeros(n, 1, dtype=torch.float64)
        self._means = torch.zeros(n, m, dtype=torch.float64)
        self._squares = torch.zeros_like(self._means)

    def add(self, indices: Tensor, samples: Tensor) -> None:
        """Add a sample ``[m]`` for each of the indices, which may repeat."""
        at, row, repeats = torch.unique(indices, return_inverse=True, return_counts=True)
        counts = repeats.double()[:, None]
        nothing = samples.new_zeros(len(at), samples.shape[1])
        means = nothing.index_add(0, row, samples) / counts
        squares = nothing.index_add(0, row, (samples - means[row]).square())
        # combines the moments of two groups, without a difference of large sums
        before = self._counts[at]
        shift = means - self._means[at]
        self._counts[at] += counts
        self._means[at] += shift * counts / self._counts[at]
        self._squares[at] += squares + shift.square() * before * counts / self._counts[at]

    def result(self) -> Values:
        """The means so far."""
        errors = standard_errors(self._squares, self._counts)
        return Values(self._means.T, errors.T, self._counts[:, 0].long())


def standard_errors(squares: Tensor, counts: Tensor) -> Tensor:
    """Standard errors of means, from the sums of squared deviations of their samples."""
    known = (squares / ((counts - 1).clamp(min=1) * counts.clamp(min=1))).sqrt()
    return torch.where(counts > 1, known, torch.inf)


def as_scores(given: Any, name: str) -> Tensor:
    """A number or m numbers as float64 ``[m]``, on the CPU.

    Raises:
        InvalidArgumentError: for anything else.
        NonFiniteError: if one is NaN or infinite.
    """
    try:
        scores = as_tensor(given, name, "a number, or one per test example [m]").double()
    except InvalidArgumentError as error:
        raise InvalidArgumentError(
            f"{name} must be a number, or one per test example [m]; got {shown(given)}"
        ) from error
    if scores.dim() > 1 or scores.numel() == 0:
        raise InvalidArgumentError(
            f"{name} must be a number, or one per test example [m]; got shape {list(scores.shape)}"
        )
    scores = scores.reshape(-1)
    bad = (~scores.isfinite()).nonzero()[:, 0].tolist()
    if bad:
        raise NonFiniteError(f"{name} is {scores[bad[0]].item()} at index {bad[0]}")
    return scores


# a function of the module, so that another process can import it
def _fit_and_score(
    fit: Fit, score: Score, model: Any, indices: Indices, inputs: Any, keep: bool
) -> tuple[Any, Tensor]:
    """The model (None unless it is kept: not every model can be pickled), and its scores."""
    model = fit(indices) if model is None else model
    some = ", ".join(map(str, indices[:5])) + (", ..." if len(indices) > 5 else "")
    scores = as_scores(score(model, inputs), f"the score of the model fitted on indices [{some}]")
    return (model if keep else None), scores


def _key(indices: Indices) -> bytes:
    return indices.tobytes()
