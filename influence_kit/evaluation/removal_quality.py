"""The rise of a query's loss after retraining without its top examples, beside random removal.

Shapes: m test examples, n training examples, F fractions, R seeds, D random draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from influence_kit.core.arguments import check_count, check_sequence
from influence_kit.core.tables import text_table
from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation.arrays import Values, count_of, numbers, standard_error
from influence_kit.evaluation.datamodel import Kind, sign_of
from influence_kit.evaluation.recipe import Measure, TrainFunction
from influence_kit.evaluation.removal import without_top
from influence_kit.evaluation.retraining import Retraining, as_retraining

MOST_DRAWS = 2**20


@dataclass(frozen=True, eq=False, repr=False)
class RemovalQuality:
    """How much worse each output is without its top examples: the result of ``removal_quality``.

    Attributes:
        fractions: the shares of the training set that are removed, ``[F]``.
        by_score: the rise of the loss (the fall of the margin) without the top examples,
            ``[m, F]``, the mean over seeds.
        at_random: the same without as many random examples, the mean over draws, ``[m, F]``.
    """

    fractions: tuple[float, ...]
    by_score: Tensor
    at_random: Tensor

    @property
    def quality(self) -> Tensor:
        """The mean over test examples of ``by_score - at_random``, ``[F]``."""
        return (self.by_score - self.at_random).mean(dim=0)

    @property
    def standard_error(self) -> Tensor | None:
        """The standard errors of ``quality`` over test examples, ``[F]``; None for a single one."""
        return standard_error(self.by_score - self.at_random)

    def __repr__(self) -> str:
        error = self.standard_error
        errors = ["-"] * len(self.fractions) if error is None else [f"{e:.2g}" for e in error]
        means = (self.by_score.mean(dim=0), self.at_random.mean(dim=0), self.quality)
        columns = [[f"{value:.4g}" for value in values.tolist()] for values in means]
        removed = [f"{fraction:.1%}" for fraction in self.fractions]
        rows = list(zip(removed, *columns, errors, strict=True))
        return text_table(["removed", "by score", "at random", "quality", "std. error"], rows)


def removal_quality(
    scores: Values,
    train: TrainFunction | Retraining,
    measure: Measure,
    outputs_are: Kind = "loss",
    fractions: Sequence[float] = (0.01, 0.05),
    seeds: Sequence[int] = (0,),
    draws: int = 4,
) -> RemovalQuality:
    r"""How much the loss of each query rises without its top examples, beyond random removal.

    .. math::
        \frac{1}{R} \sum_r \Bigl[ \ell_t(\theta_r^{-\mathrm{top}_t}) -
        \frac{1}{D} \sum_d \ell_t(\theta_r^{-d}) \Bigr]

    For each test example t and fraction, a model is trained without the training examples with the
    highest scores for t (ties by index), and D models without as many random ones, which all test
    examples share: m * F + D * F + 1 models per seed. In the unit of the loss; good scores give
    positive values, random scores 0 on average. Brittleness counts flipped predictions instead.

    Args:
        scores: ``[m, n]``; positive marks a proponent.
        train: ``train_fn(indices, seed) -> model``, or a ``Retraining``, which with a folder keeps
            the models for other measures.
        measure: ``measure(model) -> [m]``: losses (or margins) of the test examples.
        outputs_are: "loss" (lower is better) or "margin" (higher is better).
        fractions: the shares of the training set to remove, rounded to whole examples (halves up),
            each from 1 to n - 1.
        seeds: of the trainings.
        draws: D, random removals per fraction; 0 to 2**20. Without any, ``at_random`` is 0, and the
            quality is the plain rise.

    Raises:
        InvalidArgumentError: for a fraction of no or all examples, or outputs of other than m test
            examples; otherwise as ``Retraining.outputs``.

    Example:
        >>> values = torch.tensor([4.0, 0.0, 1.0, 0.0])
        >>> def train_fn(indices, seed):  # predicts the sum of its training values
        ...     model = torch.nn.Linear(1, 1)
        ...     torch.nn.init.constant_(model.bias, float(values[indices].sum()))
        ...     return model
        >>> found = removal_quality(values[None], train_fn, lambda m: -m.bias, fractions=[0.25])
        >>> found.by_score.tolist()
        [[4.0]]
    """
    retraining, sign = as_retraining(train), sign_of(outputs_are)
    check_count(draws, "draws", least=0, most=MOST_DRAWS)
    tau = numbers(scores, "scores", "[m, n]")
    (m, n), shares = tau.shape, check_sequence(fractions, "fractions", "shares of the training set")
    counts = _counts(shares, n)
    top, random = without_top(tau, counts), _without_random(n, counts, draws)
    everything = torch.ones(1, n, dtype=torch.bool)
    jobs = torch.cat([everything, top.flatten(0, 1), random.flatten(0, 1)])
    outputs = sign * retraining.outputs(jobs, measure, seeds)
    if outputs.shape[2] != m:
        raise InvalidArgumentError(
            f"`measure` returned {outputs.shape[2]} values; there are scores of {m} test examples"
        )
    worse = (outputs[:1] - outputs[1:]).mean(dim=1)  # [m * F + D * F, m]
    by_score, at_random = worse.split([top.shape[0] * len(counts), draws * len(counts)])
    own = by_score.unflatten(0, (m, len(counts))).diagonal(dim1=0, dim2=2).T
    drawn = at_random.reshape(draws, len(counts), m).sum(dim=0).T / max(draws, 1)
    return RemovalQuality(tuple(shares), own.clone(), drawn.clone())


def _counts(fractions: Sequence[float], n: int) -> list[int]:
    counts = [count_of(fraction, n) for fraction in fractions]
    if not counts or min(counts) < 1 or max(counts) >= n:
        raise InvalidArgumentError(
            f"got `fractions` {list(fractions)} of {n} examples, {counts} each; there must be at "
            f"least one, and each must remove 1 to {n - 1} examples"
        )
    return counts


def _without_random(n: int, counts: Sequence[int], draws: int) -> Tensor:
    """The training set without random examples, bool ``[D, F, n]``; larger draws hold smaller."""
    masks = torch.ones(draws, len(counts), n, dtype=torch.bool)
    for draw, rows in enumerate(masks):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(draw))
        for row, count in zip(rows, counts, strict=True):
            row[order[:count]] = False
    return masks
