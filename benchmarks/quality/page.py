"""QUALITY.md, made from the figures."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.quality.figures import TOLERANCE, TOLERANCES, Figure, Figures, Row, Scores
from benchmarks.quality.studies import CHECKPOINTS, NETWORK
from benchmarks.settings.catalog import SETTINGS

PAGE = Path(__file__).parents[1] / "QUALITY.md"
HEAD = """# Quality

Written by `make quality` ({made}) from `benchmarks/quality.json`. LDS is the linear datamodeling
score: the mean Spearman correlation between summed scores and the outputs of models trained on
random halves. The noise ceiling is what perfect scores would reach. Errors are standard errors over
three target models, or over test examples where all seeds train the same model. Methods have their
defaults unless `benchmarks/settings/methods.py` sets something else.

## Summary

The LDS of the defaults as a share of the ceiling: at the last checkpoint / over {checkpoints}
checkpoints of the run, evenly spaced. GradDot and GradCos use the last checkpoint only, TracInCP,
SOURCE and LESS use the run. The mean is over the settings in which all methods of the table were
measured, and it takes the figure over the run where there is one. *Passes* are counted by a hook:
the number of examples that went forward through the model for the scores of all test examples,
including fits, as a multiple of the number of all training and test examples; from the smallest to
the largest over the settings. Most forward passes are followed by a backward pass, and nearly all
passes of {cg} carry one vector per test example.
"""
CG = "`CGInfluenceFunction`"
# of a default that the list of short ones names: why, where it is known
REASONS: Mapping[str, str] = {}


class Standing(NamedTuple):
    """A method over the settings that all methods of networks were judged in.

    Attributes:
        method: its name.
        share: of the ceiling, the mean over settings: over the run, where the method takes one.
        passes: the most that this cost in a setting.
    """

    method: str
    share: float
    passes: float


def page(figures: Figures) -> str:
    """All of it."""
    runs = {name: one for name, one in figures.scores.items() if one.ceiling is not None}
    minima = {name: one for name, one in figures.scores.items() if one.ceiling is None}
    parts = [HEAD.format(made=figures.made, checkpoints=CHECKPOINTS, cg=CG), summary(runs)]
    if minima:
        parts += [
            "Trained to the minimum, with one model and one checkpoint: the truth has no noise, "
            "and the ceiling is 1. `ExplicitInfluenceFunction` and "
            f"{CG} take the weight decay as their damping.",
            summary(minima),
        ]
    parts += ["## Defaults below the best of the sweep", short_defaults(figures)]
    parts += [section(name, one) for name, one in figures.scores.items()]
    parts += [
        f"## {SETTINGS[name].title} (`{name}`): other metrics\n\n"
        f"{_sentence(one.remark)} LOO: correlation with leave-one-out retraining (Pearson, and "
        "of ranks). AUC and recall: wrong labels found by self-influence, next to the loss.\n\n"
        + _metric_table(one.rows)
        for name, one in figures.metrics.items()
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def summary(scores: Mapping[str, Scores]) -> str:
    """A row for each method, a column for each setting: shares of the ceiling, and passes."""
    means = {one.method: one.share for one in standings(scores)}
    rows = []
    for method in dict.fromkeys(method for one in scores.values() for method in one.rows):
        shares = [_both_shares(one, one.rows.get(method, Row())) for one in scores.values()]
        mean = f"{means[method]:.2f}" if method in means else ""
        rows.append([f"`{method}`", *shares, mean, _passes(method, scores.values())])
    return table(["method", *(f"`{name}`" for name in scores), "mean", "passes"], rows)


def standings(scores: Mapping[str, Scores]) -> list[Standing]:
    """The methods of networks by their mean share of the ceiling, the best first."""
    known = {method for one in scores.values() for method in one.rows}
    methods = [method for method in NETWORK if method in known]
    common = [one for one in scores.values() if all(method in one.rows for method in methods)]
    found = []
    for method in methods if common else ():
        figures = [(one, best_default(one.rows[method])) for one in common]
        shares = [one.share(figure) for one, figure in figures]
        passes = max(figure.passes or 0.0 for _, figure in figures)
        found.append(Standing(method, sum(shares) / len(shares), passes))
    return sorted(found, key=lambda one: -one.share)


def best_default(row: Row) -> Figure:
    """The default over the run, where the method takes one; at the last checkpoint otherwise."""
    figure = row.run or row.last
    assert figure is not None  # each method has one of them
    return figure


def _both_shares(scores: Scores, row: Row) -> str:
    return " / ".join(f"{scores.share(one):.2f}" for one in (row.last, row.run) if one)


def _passes(method: str, scores: Iterable[Scores]) -> str:
    rows = [one.rows[method] for one in scores if method in one.rows]
    each = ([row.last for row in rows], [row.run for row in rows])
    passes = ([one.passes for one in some if one and one.passes] for some in each)
    return " / ".join(_range(some) for some in passes if some)


def _range(values: Sequence[float]) -> str:
    least, most = f"{min(values):.0f}", f"{max(values):.0f}"
    return least if least == most else f"{least} to {most}"


def short_defaults(figures: Figures) -> str:
    """The defaults that are further below the best of the sweep than is tolerated."""
    lines = [
        f"- `{method}` in `{name}`: {row.last.mean:.3f}; {row.best[1].mean:.3f} at {row.best[0]}."
        + (f" {REASONS[method]}" if method in REASONS else "")
        for name, one in figures.scores.items()
        for method, row in one.rows.items()
        if row.is_short(method) and row.last and row.best
    ]
    tolerated = f"{TOLERANCE} ({min(TOLERANCES.values())} for K-FAC and EK-FAC)"
    told = "\n".join(lines) or "None."
    return f"Below the best by more than {tolerated}, at the last checkpoint:\n\n{told}"


def section(name: str, scores: Scores) -> str:
    """A setting: the defaults, and the best of the sweep with its damping."""
    ceiling = "1" if scores.ceiling is None else f"{scores.ceiling:.3f}"
    rows = []
    for method, row in scores.rows.items():
        best, at = (str(row.best[1]), row.best[0]) if row.best else ("", "")
        last = str(row.last or "")
        shown = f"**{last}**" if row.is_short(method) else last
        rows.append([f"`{method}`", shown, str(row.run or ""), best, at])
    return "\n\n".join(
        [
            f"## {SETTINGS[name].title} (`{name}`)",
            f"{_sentence(scores.remark)} Noise ceiling {ceiling}. Bold: below the best of the "
            "sweep by more than the tolerance.",
            table(["method", "LDS, last", "over the run", "best of the sweep", "damping"], rows),
        ]
    )


def _metric_table(rows: Mapping[str, Mapping[str, Figure]]) -> str:
    metrics = list(dict.fromkeys(metric for row in rows.values() for metric in row))
    cells = [[name, *(str(row.get(one, "")) for one in metrics)] for name, row in rows.items()]
    return table(["method", *metrics], cells)


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
