"""The figures of quality in the documentation: a part of sphinx/choosing.md, made from the results.

The sentences are computed from the same results as the tables, so they cannot contradict them.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from benchmarks.quality.figures import TOLERANCE, TOLERANCES, Figures, Row, Scores
from benchmarks.quality.page import (
    PAGE,
    Standing,
    best_default,
    page,
    standings,
    summary,
    table,
)
from benchmarks.settings.catalog import SETTINGS

CHOOSING = Path(__file__).parents[2] / "sphinx" / "choosing.md"
FIRST, LAST = "<!-- made of benchmarks/quality.json -->", "<!-- until here -->"
# what a method may cost for a model whose passes are expensive
FEW_PASSES = 50.0
# the settings of the second table, and the metrics of each
OTHERS = {"digits-mlp": ["AUC"], "digits-lr": ["LOO", "LOO, ranks"]}


def write_documents(figures: Figures) -> None:
    """QUALITY.md and the part of the choosing page."""
    PAGE.write_text(page(figures))
    CHOOSING.write_text(with_part(CHOOSING.read_text(), choosing(figures)))


def with_part(text: str, part: str) -> str:
    """A page with another part between the two marks."""
    pattern = f"(?<={re.escape(FIRST)}\n).*?(?={re.escape(LAST)})"
    changed, count = re.subn(pattern, lambda _: part, text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"the page has {count} parts between {FIRST} and {LAST}, not one")
    return changed


def choosing(figures: Figures) -> str:
    """The part of the choosing page: tables, and sentences computed from them."""
    runs = {name: one for name, one in figures.scores.items() if one.ceiling is not None}
    parts = [
        summary(runs),
        "\n".join(f"- {line}" for line in _settings(runs)),
        "\n".join(f"- {line}" for line in [*_lessons(runs), *_of_minima(figures)]),
    ]
    if any(name in figures.metrics for name in OTHERS):
        parts += [
            "Wrong labels found by self-influence (AUC), and correlation with leave-one-out:",
            _other_metrics(figures),
        ]
    return "\n" + "\n\n".join(parts) + "\n\n"


def for_small_models(scores: Mapping[str, Scores]) -> Standing:
    """The method whose default is best, whatever the cost."""
    return standings(scores)[0]


def for_large_models(scores: Mapping[str, Scores]) -> Standing:
    """The one whose default is best for a few passes."""
    return next(one for one in standings(scores) if one.passes <= FEW_PASSES)


def _settings(scores: Mapping[str, Scores]) -> Iterator[str]:
    for name, one in scores.items():
        yield f"`{name}`: {SETTINGS[name].title}; {one.remark}; noise ceiling {one.ceiling:.3f}."


def _lessons(scores: Mapping[str, Scores]) -> Iterator[str]:
    """What the table shows, computed."""
    small, large = for_small_models(scores), for_large_models(scores)
    yield (
        f"**The best default for a small model** is `{small.method}`: {small.share:.2f} of the "
        f"ceiling, for up to {small.passes:.0f} passes. With at most {FEW_PASSES:.0f} passes, "
        f"`{large.method}` is best and reaches {large.share:.2f}."
    )
    yield _of_runs(scores)
    yield _of_dampings(scores)
    yield _of_datainf(scores)
    yield from _of_cosines(scores)


def _of_runs(scores: Mapping[str, Scores]) -> str:
    both = [
        (one.share(row.last), one.share(row.run), method)
        for one in scores.values()
        for method, row in one.rows.items()
        if row.last and row.run
    ]
    better = sum(run > last for last, run, _ in both)
    gains: dict[str, list[float]] = {}
    for last, run, method in both:
        gains.setdefault(method, []).append(run - last)
    mean = {method: sum(each) / len(each) for method, each in gains.items()}
    ranked = sorted(mean, key=lambda method: -mean[method])
    told = ", ".join(f"`{method}` by {mean[method]:.2f}" for method in ranked)
    return (
        "**The mean over several checkpoints** of one run "
        f"([how](concepts.md#several-checkpoints)) is better than the last checkpoint alone "
        f"in {better} of {len(both)} cases (a case is one method in one setting). The mean gain: "
        f"{told}."
    )


def _of_dampings(scores: Mapping[str, Scores]) -> str:
    tried = {
        method: [one.rows[method] for one in scores.values() if _was_swept(one.rows.get(method))]
        for method in dict.fromkeys(method for one in scores.values() for method in one.rows)
    }
    told = ", ".join(
        f"`{method}` in {sum(not row.is_short(method) for row in rows)} of {len(rows)}"
        for method, rows in tried.items()
        if rows
    )
    return (
        '**`damping="auto"`** at the last checkpoint is within '
        f"{TOLERANCE} ({min(TOLERANCES.values())} for K-FAC and EK-FAC) of the best single number "
        f"of a sweep from 1e-6 to 10: {told} settings. `benchmarks/QUALITY.md` lists the others."
    )


def _was_swept(row: Row | None) -> bool:
    return row is not None and row.best is not None


def _of_datainf(scores: Mapping[str, Scores]) -> str:
    gains = []
    for one in scores.values():
        row, plain = one.rows.get("DataInf"), one.rows.get("GradDot")
        if row and row.best and plain and plain.last:
            gains.append(row.best[1].mean - plain.last.mean)
    return (
        f"**`DataInf`** at its best damping is better than `GradDot` by {max(gains):.2f} at most, "
        f"and by {sum(gains) / len(gains):.2f} on average. If the damping is far below the squared "
        "norms of the gradients, the mean of the inverses removes from a gradient little more than "
        "the example's own direction; if it is far above, nothing."
    )


def _of_cosines(scores: Mapping[str, Scores]) -> Iterator[str]:
    """The methods that a cosine of plain gradients beats."""
    settings = {name: one for name, one in scores.items() if "GradCos" in one.rows}
    below: dict[str, list[str]] = {}
    for name, one in settings.items():
        cosine = best_default(one.rows["GradCos"]).mean
        for method, row in one.rows.items():
            if best_default(row).mean < cosine:
                below.setdefault(method, []).append(f"`{name}`")
    if below:
        told = "; ".join(f"`{method}` in {', '.join(names)}" for method, names in below.items())
        yield f"**Defaults below `GradCos`** (over the run, where they take one): {told}."


def _of_minima(figures: Figures) -> Iterator[str]:
    minima = {name: one for name, one in figures.scores.items() if one.ceiling is None}
    exact, kronecker = (
        [best_default(one.rows[method]).mean for one in minima.values() if method in one.rows]
        for method in ("ExplicitInfluenceFunction", "EKFACInfluenceFunction")
    )
    yield (
        "**Convex models** trained to the minimum "
        f"({', '.join(f'`{name}`' for name in minima)}): the exact Hessian with the penalty as its "
        f"damping has an LDS of {min(exact):.2f} to {max(exact):.2f}, EK-FAC {min(kronecker):.2f} "
        f"to {max(kronecker):.2f}."
    )


def _other_metrics(figures: Figures) -> str:
    there = {name: metrics for name, metrics in OTHERS.items() if name in figures.metrics}
    columns = [(name, metric) for name, metrics in there.items() for metric in metrics]
    methods = dict.fromkeys(method for name in there for method in figures.metrics[name].rows)
    rows = []
    for method in methods:
        row = [figures.metrics[name].rows.get(method, {}).get(metric) for name, metric in columns]
        shown = method if method.startswith("(") else f"`{method}`"
        rows.append([shown, *("" if one is None else f"{one.mean:.3f}" for one in row)])
    return table(["method", *(f"`{name}`: {metric}" for name, metric in columns)], rows)
