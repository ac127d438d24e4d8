"""What happens to the model when the examples of the highest scores are removed.

Shapes: m test examples, n training examples, K counts, F fractions, R repeats (seeds).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from influence_kit.core.arguments import check_count, check_flag, check_seed, check_sequence
from influence_kit.core.tables import text_table
from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation.arrays import Values, count_of, numbers, standard_error
from influence_kit.evaluation.recipe import Measure, TrainFunction
from influence_kit.evaluation.retraining import Retraining, as_retraining

MOST_REPEATS = 2**20


@dataclass(frozen=True, eq=False, repr=False)
class Brittleness:
    """How often predictions flip without their top proponents: the result of ``brittleness``.

    Attributes:
        counts: how many proponents were removed, ``[K]``.
        flipped: the share of seeds for which the prediction flipped, ``[m, K]``.
    """

    counts: tuple[int, ...]
    flipped: Tensor

    @property
    def share(self) -> Tensor:
        """The share of flipped predictions at each count, ``[K]``."""
        return self.flipped.mean(dim=0)

    @property
    def standard_error(self) -> Tensor | None:
        """The standard errors of the shares over test examples, ``[K]``; None for a single one."""
        return standard_error(self.flipped)

    def __repr__(self) -> str:
        rows = [[c, f"{s:.1%}"] for c, s in zip(self.counts, self.share.tolist(), strict=True)]
        return text_table(["removed", "flipped"], rows)


@dataclass(frozen=True, eq=False, repr=False)
class RemovalCurve:
    """Outputs of models trained without (or with only) the examples of the highest scores.

    Attributes:
        fractions: the shares of the training set that are removed (kept), ``[F]``.
        by_score: the mean output of each model with examples chosen by score, ``[F, R]``.
        at_random: the mean output of each model with examples drawn at random, ``[F, R]``.
        keep: whether these examples are kept and all others removed.
    """

    fractions: tuple[float, ...]
    by_score: Tensor
    at_random: Tensor
    keep: bool

    def __repr__(self) -> str:
        verb = "kept" if self.keep else "removed"
        header = [verb, "by score", "std. error", "at random", "std. error"]
        columns: list[list[str]] = [[f"{fraction:.1%}" for fraction in self.fractions]]
        for values in (self.by_score, self.at_random):
            error = standard_error(values, dim=1)
            columns.append([f"{value:.4g}" for value in values.mean(dim=1).tolist()])
            columns.append(["-"] * len(values) if error is None else [f"{e:.2g}" for e in error])
        return text_table(header, list(zip(*columns, strict=True)))


def brittleness(
    scores: Values,
    train: TrainFunction | Retraining,
    predict: Measure,
    counts: Sequence[int],
    seeds: Sequence[int] = (0,),
) -> Brittleness:
    """Whether each test example's prediction flips without its top proponents: ``[m, K]``.

    For each test example and count, the training examples with the highest scores (ties by index)
    are removed, a model is trained on the rest, and its prediction is compared with that of the
    model of the same seed trained on all examples. That is m * K + 1 models per seed. Good scores
    flip predictions with few removals; compare with random scores.

    Args:
        scores: ``[m, n]``; positive marks a proponent.
        train: ``train_fn(indices, seed) -> model``, or a ``Retraining``.
        predict: ``predict(model) -> [m]``, the predicted classes of the test examples.
        counts: how many proponents to remove, each from 1 to n - 1.
        seeds: of the trainings.

    Raises:
        InvalidArgumentError: for counts outside their range, predictions for other than m test
            examples, or predictions that are not classes; otherwise as ``Retraining.outputs``.
    """
    retraining = as_retraining(train)
    tau = numbers(scores, "scores", "[m, n]")
    masks = without_top(tau, counts)
    everything = torch.ones(1, tau.shape[1], dtype=torch.bool)
    jobs = torch.cat([everything, masks.flatten(0, 1)])
    classes = retraining.outputs(jobs, predict, seeds)
    if classes.shape[2] != len(tau):
        raise InvalidArgumentError(
            f"`predict` returned {classes.shape[2]} classes; there are scores of {len(tau)} test "
            "examples"
        )
    if not torch.equal(classes, classes.round()):
        raise InvalidArgumentError(
            f"`predict` returned {classes[classes != classes.round()][0].item():.6g}; it must "
            "return predicted classes, whole numbers, such as the `argmax` of the logits"
        )
    without = classes[1:].unflatten(0, masks.shape[:2])
    # the prediction for each test example by the model without that example's proponents
    own = without.diagonal(dim1=0, dim2=3)  # [K, R, m]
    flipped = (own != classes[0]).double()
    return Brittleness(tuple(counts), flipped.mean(dim=1).T)


def without_top(scores: Tensor, counts: Sequence[int]) -> Tensor:
    """The training set without each test example's top proponents, bool ``[m, K, n]``."""
    m, n = scores.shape
    counts = list(check_sequence(counts, "counts", "ints"))
    wrong = [c for c in counts if not isinstance(c, int | np.integer) or not 1 <= c < n]
    wrong += [c for c in counts if isinstance(c, bool)]
    if wrong or len(counts) == 0:
        raise InvalidArgumentError(
            f"`counts` is {list(counts)}; there must be at least one, and each must be an int from "
            f"1 to {n - 1}, since at most that many of {n} examples can be removed"
        )
    order = scores.argsort(dim=1, descending=True, stable=True)
    masks = torch.ones(m, len(counts), n, dtype=torch.bool)
    for column, count in enumerate(counts):
        masks[:, column].scatter_(1, order[:, :count], False)
    return masks


def removal_curve(
    scores: Values,
    train: TrainFunction | Retraining,
    measure: Measure,
    fractions: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5),
    keep: bool = False,
    repeats: int = 3,
    seed: int = 0,
) -> RemovalCurve:
    """Outputs without the examples of the highest scores, and without as many random ones.

    If scores identify what helps, removing by score does more harm than removing at random, and
    keeping by score less. Pass ``-scores`` to remove first what hurts. Each point of a curve is
    ``repeats`` models, each with its own training seed and, at random, its own draw.

    Args:
        scores: of each training example, ``[n]``, such as the mean over a validation set.
        train: ``train_fn(indices, seed) -> model``, or a ``Retraining``.
        measure: ``measure(model) -> [m]``; the curve is its mean over the test examples.
        fractions: the shares of the training set to remove (keep), rounded to whole examples
            (halves up); at least one example must be left.
        keep: keep only these examples instead of removing them.
        repeats: R, models per point.
        seed: the trainings and draws have the seeds seed, ..., seed + R - 1.

    Raises:
        InvalidArgumentError: for no repeats, or a fraction that leaves no example or more than
            there are; otherwise as ``Retraining.outputs``.
    """
    retraining, keep, seed = as_retraining(train), check_flag(keep, "keep"), check_seed(seed)
    check_count(repeats, "repeats", least=0, most=MOST_REPEATS)
    fractions = check_sequence(fractions, "fractions", "shares of the training set")
    values = numbers(scores, "scores", "[n]")
    n, seeds = len(values), range(seed, seed + repeats)
    sizes = [count_of(fraction, n) for fraction in fractions]
    low, high = (1, n) if keep else (0, n - 1)
    if repeats < 1 or not sizes or min(sizes) < low or max(sizes) > high:
        raise InvalidArgumentError(
            f"got {repeats} repeats and `fractions` {list(fractions)} of {n} examples, {sizes} "
            f"each; there must be at least one repeat and fraction, and {low} to {high} examples "
            f"to {'keep' if keep else 'remove'}"
        )
    by_score = values.argsort(descending=True, stable=True)
    orders = [by_score] * repeats
    orders += [torch.randperm(n, generator=torch.Generator().manual_seed(s)) for s in seeds]
    masks = torch.full((len(sizes), len(orders), n), not keep)
    for point, size in enumerate(sizes):
        for column, order in enumerate(orders):
            masks[point, column, order[:size]] = keep
    pairs = masks.flatten(0, 1)
    outputs = retraining.paired_outputs(pairs, measure, [*seeds, *seeds] * len(sizes))
    curves = outputs.mean(dim=1).unflatten(0, (len(sizes), 2, repeats))
    return RemovalCurve(tuple(fractions), curves[:, 0], curves[:, 1], keep)
