"""What every value is made of: models fitted on parts of the training set, and means over them.

Letters: m test and n training examples.
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

from influence_kit.core.arguments import check_count
from influence_kit.core.processes import process_count, results
from influence_kit.core.summary import summary
from influence_kit.errors import InvalidArgumentError, NonFiniteError

Places = NDArray[np.int64]
Marks = NDArray[np.bool_]
Fit = Callable[[np.ndarray], Any]
Score = Callable[[Any, Any], Any]


class Values(NamedTuple):
    """Estimated values of the training examples, and how far to trust them.

    Attributes:
        values: float64 ``[m, n]``; one row where there is no test set, or one number a model.
        standard_errors: of the values, ``[m, n]``, from the spread of the samples; infinite where
            there is but one sample.
        counts: how many samples the value of each training example is a mean of, int64 ``[n]``.
    """

    values: Tensor
    standard_errors: Tensor
    counts: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Valuation(DataInfluence):
    """Values from ``score(fit(places), inputs)``, for many choices of places.

    Args:
        fit: gives the model that is fitted on the training examples at ``places``, an ascending
            int64 array. Any object will do for a model. Equal places must give equal models: what
            is random in ``fit`` has a seed.
        score: how good a model is, the higher the better: a number, or one a test example ``[m]``.
        train_count: n, how many training examples there are.
        seed: of all that is drawn. The draws do not depend on ``n_jobs``.
        n_jobs: how many processes fit models, as joblib counts them (-1: one a core). Other numbers
            than 1 need the extra ``parallel``.
        keep_models: keep each model in memory, so that further questions fit none again.
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
        check_count(self.train_count, "train_count")
        process_count(self.n_jobs)

    @cached_property
    def _models(self) -> dict[bytes, Any]:
        """The models kept, by the bytes of their places."""
        return {}

    def _scores(self, jobs: Sequence[tuple[Places, Any]], bar: "tqdm[Any]") -> Iterator[Tensor]:
        """For each pair of places and inputs, the scores of the model fitted there."""
        calls = (
            (self.fit, self.score, self._models.get(_key(places)), places, inputs, self.keep_models)
            for places, inputs in jobs
        )
        done = results(_fit_and_score, calls, self.n_jobs, ordered=True)
        for (places, _), (model, scores) in zip(jobs, done, strict=True):
            if self.keep_models:
                self._models[_key(places)] = model
            bar.update()
            yield scores

    def _bar(self, total: int, show: bool) -> "tqdm[Any]":
        """A bar of models; there may be fewer than ``total``."""
        text = f"Using {self.get_name()} to fit models"
        return tqdm(desc=text, total=total, disable=not show)


class Moments:
    """Means of samples ``[m]`` of n places, and their standard errors, without keeping samples."""

    def __init__(self, n: int, m: int) -> None:
        self._counts = torch.zeros(n, 1, dtype=torch.float64)
        self._means = torch.zeros(n, m, dtype=torch.float64)
        self._squares = torch.zeros_like(self._means)

    def add(self, places: Tensor, samples: Tensor) -> None:
        """Take a sample ``[m]`` for each of the places, which may repeat."""
        at, row, repeats = torch.unique(places, return_inverse=True, return_counts=True)
        counts = repeats.double()[:, None]
        nothing = samples.new_zeros(len(at), samples.shape[1])
        means = nothing.index_add(0, row, samples) / counts
        squares = nothing.index_add(0, row, (samples - means[row]).square())
        # the moments of two groups from those of each: no difference of large sums
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
    """Of means over samples, from the summed squares of their distances from the mean."""
    known = (squares / ((counts - 1).clamp(min=1) * counts.clamp(min=1))).sqrt()
    return torch.where(counts > 1, known, torch.inf)


def as_scores(given: Any, name: str) -> Tensor:
    """A number or m numbers as float64 ``[m]``, on the CPU.

    Raises:
        InvalidArgumentError: for anything else.
        NonFiniteError: where one is NaN or infinite.
    """
    try:
        scores = torch.as_tensor(given).detach().to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidArgumentError(
            f"{name} must be a number, or one a test example; got {given!r}"
        ) from error
    if scores.dim() > 1 or scores.numel() == 0:
        raise InvalidArgumentError(
            f"{name} must be a number, or one a test example [m]; got shape {list(scores.shape)}"
        )
    scores = scores.reshape(-1)
    bad = (~scores.isfinite()).nonzero()[:, 0].tolist()
    if bad:
        raise NonFiniteError(f"{name} is {scores[bad[0]].item()} at place {bad[0]}")
    return scores


# stands by itself, so that another process can be asked for it
def _fit_and_score(
    fit: Fit, score: Score, model: Any, places: Places, inputs: Any, keep: bool
) -> tuple[Any, Tensor]:
    """The model (None unless it is kept: not every model can travel), and its scores."""
    model = fit(places) if model is None else model
    some = ", ".join(map(str, places[:5])) + (", ..." if len(places) > 5 else "")
    scores = as_scores(score(model, inputs), f"the score of the model fitted on places [{some}]")
    return (model if keep else None), scores


def _key(places: Places) -> bytes:
    return places.tobytes()
