"""The figures of `make quality`, as they are kept in ``benchmarks/quality.json``.

All pages are made of that file alone.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.settings.catalog import SETTINGS
from benchmarks.settings.methods import METHODS
from benchmarks.settings.plan import Result

FILE = Path(__file__).parents[1] / "quality.json"
# how far a default may be below the best of the sweep before the page marks it
TOLERANCE, TOLERANCES = 0.05, {"KFACInfluenceFunction": 0.03, "EKFACInfluenceFunction": 0.03}
# levels of the file that have a line an entry
DEPTH = 4


class Figure(NamedTuple):
    """A mean over target models.

    Attributes:
        mean: of the metric.
        error: its standard error; None where there is one value only.
        passes: that the scores cost, where that was counted.
    """

    mean: float
    error: float | None = None
    passes: float | None = None

    @classmethod
    def of(cls, result: Result, passes: float | None = None) -> "Figure":
        """Of a result, as it is kept."""
        error = None if result.error is None else round(result.error, 4)
        return cls(round(result.mean, 4), error, None if passes is None else round(passes, 1))

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + ("" if self.error is None else f" ± {self.error:.3f}")


@dataclass(frozen=True)
class Row:
    """The linear datamodeling score of a method in a setting.

    Attributes:
        last: of the default at the last checkpoint; None of methods that follow a run.
        run: of the default over the checkpoints of the run; None of methods that look at one.
        sweep: at the last checkpoint with one damping for all blocks, by that damping; None where
            it was refused.
    """

    last: Figure | None = None
    run: Figure | None = None
    sweep: Mapping[str, Figure | None] = field(default_factory=dict)

    @property
    def best(self) -> tuple[str, Figure] | None:
        """The damping of the sweep with the highest score, and that score."""
        found = {damping: figure for damping, figure in self.sweep.items() if figure is not None}
        return max(found.items(), key=lambda item: item[1].mean) if found else None

    def is_short(self, method: str) -> bool:
        """Whether the default is further below the best of the sweep than is tolerated."""
        if self.last is None or self.best is None:
            return False
        # of figures as they are kept: .05 is not more than .05
        missing = round(self.best[1].mean - self.last.mean, 4)
        return missing > TOLERANCES.get(method, TOLERANCE)


@dataclass(frozen=True)
class Scores:
    """The linear datamodeling scores in a setting.

    Attributes:
        ceiling: what perfect scores would reach, given the noise of training; None where all seeds
            train the same model: nothing is noise there, and it is 1.
        remark: what a reader has to know.
        rows: by method.
    """

    ceiling: float | None
    remark: str
    rows: Mapping[str, Row]

    def share(self, figure: Figure) -> float:
        """A score as a share of the ceiling."""
        return figure.mean / (self.ceiling or 1.0)


@dataclass(frozen=True)
class Metrics:
    """Other metrics in a setting.

    Attributes:
        remark: what a reader has to know.
        rows: by method, and then by metric.
    """

    remark: str
    rows: Mapping[str, Mapping[str, Figure]]


@dataclass(frozen=True)
class Figures:
    """All of them.

    Attributes:
        made: where: the version of torch and the machine.
        scores: the linear datamodeling scores, by setting.
        metrics: other metrics, by setting.
    """

    made: str = ""
    scores: Mapping[str, Scores] = field(default_factory=dict)
    metrics: Mapping[str, Metrics] = field(default_factory=dict)

    def with_scores(self, setting: str, found: Scores) -> "Figures":
        """These and others; methods that were judged before stay."""
        there = self.scores[setting].rows if setting in self.scores else {}
        rows = _in_order({**there, **found.rows}, METHODS)
        scores = {**self.scores, setting: replace(found, rows=rows)}
        return replace(self, scores=_in_order(scores, SETTINGS))

    def with_metrics(self, setting: str, found: Metrics) -> "Figures":
        """The same of other metrics."""
        there = self.metrics[setting].rows if setting in self.metrics else {}
        rows = _in_order({**there, **found.rows}, METHODS)
        metrics = {**self.metrics, setting: replace(found, rows=rows)}
        return replace(self, metrics=_in_order(metrics, SETTINGS))


def _in_order(items: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Items in the order of the names, and what is not among them (TRAK-10, losses) at the end."""
    order = {name: place for place, name in enumerate(names)}
    return dict(sorted(items.items(), key=lambda item: order.get(item[0], len(order))))


def read(path: Path = FILE) -> Figures:
    """The figures that are kept in a file; none where there is no file."""
    if not path.exists():
        return Figures()
    kept = json.loads(path.read_text())
    scores = {
        name: Scores(
            one["ceiling"],
            one["remark"],
            {method: _row(row) for method, row in one["rows"].items()},
        )
        for name, one in kept["scores"].items()
    }
    metrics = {
        name: Metrics(
            one["remark"],
            {
                method: {metric: Figure(*figure) for metric, figure in row.items()}
                for method, row in one["rows"].items()
            },
        )
        for name, one in kept["metrics"].items()
    }
    return Figures(kept["made"], scores, metrics)


def _row(kept: Mapping[str, Any]) -> Row:
    last, run, sweep = (kept.get(key) for key in ("last", "run", "sweep"))
    return Row(
        Figure(*last) if last else None,
        Figure(*run) if run else None,
        {damping: Figure(*figure) if figure else None for damping, figure in (sweep or {}).items()},
    )


def write(figures: Figures, path: Path = FILE) -> None:
    """Keep the figures in a file."""
    scores = {
        name: {"ceiling": one.ceiling, "remark": one.remark, "rows": _rows(one.rows)}
        for name, one in figures.scores.items()
    }
    metrics = {name: vars(one) for name, one in figures.metrics.items()}
    kept = {"made": figures.made, "scores": scores, "metrics": metrics}
    path.write_text(_text(kept) + "\n")


def _rows(rows: Mapping[str, Row]) -> dict[str, dict[str, Any]]:
    return {
        method: {key: value for key, value in vars(row).items() if value}
        for method, row in rows.items()
    }


def _text(kept: Any, depth: int = 0) -> str:
    """JSON with a line for each method."""
    if depth == DEPTH or not isinstance(kept, Mapping) or not kept:
        return json.dumps(kept, ensure_ascii=False)
    indent = " " * (depth + 1)
    lines = [f"{indent}{json.dumps(key)}: {_text(v, depth + 1)}" for key, v in kept.items()]
    return "{\n" + ",\n".join(lines) + f"\n{' ' * depth}}}"
