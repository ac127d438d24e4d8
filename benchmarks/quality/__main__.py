"""``make quality``: how good every method is, in settings with data of their own and with DATA.

Writes benchmarks/quality.json after each method, and from it benchmarks/QUALITY.md and the figures
of sphinx/choosing.md. Models trained on subsets and all scores are kept in a folder, so that a run
that is cut goes on; scores are made again where the code has changed since. Seconds are not in the
tables: ``make bench`` measures those.
"""

import argparse
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.quality import documents
from benchmarks.quality.figures import FILE, Figures, Scores, read, write
from benchmarks.quality.studies import (
    Study,
    metric_studies,
    metrics_of,
    score_studies,
    scores_of,
)
from benchmarks.settings.catalog import SETTINGS
from benchmarks.settings.methods import METHODS


def make_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser("python -m benchmarks.quality", description=__doc__)
    folder = Path(tempfile.gettempdir()) / "influence_kit_quality"
    add = parser.add_argument
    add("--data", type=Path, metavar="FOLDER", help="with the data sets' own files")
    add("--out", type=Path, default=folder, help="for models and scores (default: %(default)s)")
    add("--json", type=Path, default=FILE, help="the figures (default: %(default)s)")
    add("--processes", type=int, default=2, help="in which models are trained")
    add("--only", nargs="+", choices=SETTINGS, metavar="SETTING", help="some of the settings")
    add("--methods", nargs="+", metavar="METHOD", help=f"some of {', '.join(METHODS)}, TRAK-10")
    add("--render", action="store_true", help="run nothing: make the pages of the figures")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all studies, or some, and write the pages."""
    given = make_parser().parse_args(arguments)
    if not given.render:
        for study in score_studies(given.processes):
            _run(study, given, is_scores=True)
        for study in metric_studies(given.processes):
            _run(study, given, is_scores=False)
    if given.json == FILE:
        documents.write_documents(read(FILE))


def _run(study: Study, given: argparse.Namespace, is_scores: bool) -> None:
    study = study.of_methods(given.methods)
    if (given.only and study.setting not in given.only) or not study.plan.methods:
        return
    if study.needs and given.data is None:
        print(f"{study.setting}: left out; give --data, a folder with {study.needs}", flush=True)
        return
    start, data = (time.monotonic(), time.process_time()), study.load(given.data)
    if is_scores:
        scores_of(study, data, given.out, partial(_keep_scores, given.json, study.setting))
    else:
        found = metrics_of(study, data, given.out)
        write(_now(given.json).with_metrics(study.setting, found), given.json)
    took, computed = time.monotonic() - start[0], time.process_time() - start[1]
    print(f"{study.setting}: {took:.0f} s, {computed:.0f} s of them computing", flush=True)


def _keep_scores(path: Path, name: str, found: Scores) -> None:
    write(_now(path).with_scores(name, found), path)


def _now(path: Path) -> Figures:
    """The figures that are kept, as made here."""
    return replace(read(path), made=f"torch {torch.__version__}, {platform.machine()}")


if __name__ == "__main__":
    main()
