"""A run: how good methods are in a setting, by each of the metrics asked for.

Shapes: n training and m test examples, T target models, S subsets, R models on each.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.settings.data import Data
from benchmarks.settings.plan import Plan, Result
from benchmarks.settings.setting import Setting
from benchmarks.settings.workplace import Workplace
from influence_kit.core.tables import text_table
from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation import (
    RowCorrelation,
    half_subsets,
    last_loss,
    leave_one_out,
    linear_datamodeling_score,
    loo_correlation,
    mean_loss,
    mislabel_auc,
    recall_at,
)
from influence_kit.evaluation.cost import measured

# of the truth: other seeds than those of the target models, which are 0, 1, ...
TRUTH_SEEDS = 1000
INSPECTED = 0.1
RECALL = f"recall at {INSPECTED:.0%}"


def run(setting: Setting, data: Data, plan: Plan, folder: Path) -> list[Result]:
    """All results, metric by metric.

    Args:
        setting: the setting.
        data: as ``setting.load`` gave it.
        plan: how much to do.
        folder: where models and scores are kept; a run with the same data goes on there.

    Raises:
        InvalidArgumentError: for what the setting does not have.
    """
    plan.check(setting)
    workplace = Workplace(setting, data, plan, folder)
    results: list[Result] = []
    if plan.subsets:
        results += by_subsets(workplace)
    if plan.left_out:
        results += by_leaving_out(workplace)
    if plan.wrong_share:
        results += by_wrong_labels(workplace)
    return results


def by_subsets(workplace: Workplace) -> Iterator[Result]:
    """The linear datamodeling score of each method, and the noise ceiling where it is known."""
    subsets, outputs = truth(workplace)
    ceiling = None
    for name in workplace.plan.methods:
        found = [
            linear_datamodeling_score(scores, subsets, outputs, "margin")
            for scores in workplace.scores_by_target(name)
        ]
        ceiling = found[0].ceiling
        yield over_targets("LDS", name, found, workplace.seconds(name))
    if ceiling is not None:
        yield Result("LDS", "(noise ceiling)", (ceiling,), None, None)


def truth(workplace: Workplace) -> tuple[Tensor, Tensor]:
    """Random halves ``[S, n]``, and what models trained on them give ``[S, R, m]``."""
    plan, count = workplace.plan, len(workplace.data.train)
    subsets = half_subsets(count, plan.subsets, seed=plan.seed)
    seeds = [TRUTH_SEEDS + repeat for repeat in range(plan.repeats)]
    return subsets, workplace.retraining.outputs(subsets, workplace.measure, seeds)


def by_leaving_out(workplace: Workplace) -> Iterator[Result]:
    """How well each method predicts leaving one example out: by values, and by ranks."""
    plan, count = workplace.plan, len(workplace.data.train)
    if plan.left_out > count:
        raise InvalidArgumentError(
            f"{plan.left_out} examples cannot be left out in turn: there are {count}"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(plan.seed))
    left_out = order[: plan.left_out]
    seeds = [TRUTH_SEEDS + repeat for repeat in range(plan.repeats)]
    differences = leave_one_out(
        workplace.retraining, count, workplace.measure, "margin", left_out, seeds
    )
    for name in plan.methods:
        found = [
            loo_correlation(scores[:, left_out], differences)
            for scores in workplace.scores_by_target(name)
        ]
        seconds = workplace.seconds(name)
        yield over_targets("LOO", name, [one.pearson for one in found], seconds)
        yield over_targets("LOO, ranks", name, [one.spearman for one in found], seconds)


def by_wrong_labels(workplace: Workplace) -> Iterator[Result]:
    """How well self-influence finds changed labels, and how well losses do.

    Each target model has other wrong labels.
    """
    plan = workplace.plan
    aucs: dict[str, list[float]] = {}
    recalls: dict[str, list[float]] = {}
    seconds: dict[str, float] = {}
    for target in range(plan.targets):
        data, is_wrong = workplace.data.with_wrong_labels(plan.wrong_share, plan.seed + target)
        changed = Workplace(workplace.setting, data, plan, workplace.folder / f"wrong{target}")
        for name, (suspicion, own_seconds) in _suspicions(changed, target).items():
            aucs.setdefault(name, []).append(mislabel_auc(suspicion, is_wrong))
            recalls.setdefault(name, []).append(recall_at(suspicion, is_wrong, INSPECTED))
            if own_seconds is not None:
                seconds[name] = seconds.get(name, 0.0) + own_seconds / plan.targets
    for metric, found in (("AUC", aucs), (RECALL, recalls)):
        for name, values in found.items():
            yield Result(metric, name, tuple(values), error_of(values), seconds.get(name))


def _suspicions(workplace: Workplace, target: int) -> dict[str, tuple[Tensor, float | None]]:
    """How suspicious each training example is ``[n]``, by each method that says, and by losses."""
    losses = workplace.losses(target)
    found: dict[str, tuple[Tensor, float | None]] = {
        "(mean loss)": (mean_loss(losses), None),
        "(last loss)": (last_loss(losses), None),
    }
    for name in workplace.plan.methods:
        method = workplace.method(name, target)
        if hasattr(method, "self_influence"):
            suspicion, cost = measured(method.self_influence)
            found[name] = suspicion, cost.seconds
    return found


def over_targets(
    metric: str, method: str, found: Sequence[RowCorrelation], seconds: float | None
) -> Result:
    """One result from those for each target model."""
    values = [one.mean for one in found]
    error = found[0].standard_error if len(found) == 1 else error_of(values)
    return Result(metric, method, tuple(values), error, seconds)


def error_of(values: Sequence[float]) -> float | None:
    """The standard error of a mean; None for a single value."""
    return None if len(values) < 2 else float(np.std(values, ddof=1) / len(values) ** 0.5)


def report(setting: Setting, results: Sequence[Result]) -> str:
    """The results as a table, and below it what others published for the setting."""
    rows = [
        [
            one.metric,
            one.method,
            f"{one.mean:.3f}",
            "-" if one.error is None else f"{one.error:.3f}",
            "-" if one.seconds is None else f"{one.seconds:.1f}",
        ]
        for one in results
    ]
    parts = [text_table(["metric", "method", "mean", "std. error", "seconds"], rows)]
    metrics = {one.metric for one in results}
    figures = [
        [one.metric, one.method, f"{one.value:.3f}", one.source]
        for one in setting.published
        if one.metric in metrics
    ]
    if figures:
        table = text_table(["metric", "method", "value", "source"], figures)
        parts.append(f"Published for this setting (other models, masks and tuning):\n\n{table}")
    return "\n\n".join(parts)
