"""``python -m benchmarks.spacing``: five checkpoints of one run, at equal distances or geometric.

Prints the linear datamodeling score of methods over both selections of ``select_checkpoints``, in
settings of ``make quality``, whose models on subsets are trained first where the folder lacks them.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.quality.studies import CHECKPOINTS, Study, score_studies
from benchmarks.settings.catalog import SETTINGS
from benchmarks.settings.run import truth
from benchmarks.settings.workplace import Workplace
from influence_kit import select_checkpoints
from influence_kit.evaluation import linear_datamodeling_score

SPACINGS = ("even", "geometric")


def scores_by_spacing(
    study: Study, methods: Sequence[str], data: Path | None, folder: Path
) -> Iterator[tuple[str, str, list[float]]]:
    """Method, spacing, and its score for each target model."""
    setting = SETTINGS[study.setting]
    own = study.load(data)
    known = Workplace(setting, own, study.plan, folder / study.setting)
    subsets, outputs = truth(known)
    every = replace(study.plan, checkpoints=setting.recipe.epochs)
    runs = Workplace(setting, own, every, folder / study.setting)
    for method in methods:
        for spacing in SPACINGS:
            found = []
            for seed in runs.target_seeds:
                run = runs.target(seed).checkpoints
                few = select_checkpoints(run, CHECKPOINTS, spacing=spacing)
                scores = runs.method(method, seed, checkpoints=few).influence(own.test.tensors)
                score = linear_datamodeling_score(scores, subsets, outputs, "margin")
                found.append(float(score.mean))
            yield method, spacing, found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.spacing", description=__doc__)
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="with the data sets' own files")
    parser.add_argument("--out", type=Path, default=Path("/tmp/influence_kit_quality"))
    parser.add_argument("--only", nargs="+", default=["sparse"], metavar="SETTING")
    parser.add_argument("--methods", nargs="+", default=["EKFACInfluenceFunction", "TRAK"])
    given = parser.parse_args()
    for study in score_studies(1):
        if study.setting in given.only:
            rows = scores_by_spacing(study, given.methods, given.data, given.out)
            for method, spacing, found in rows:
                each = ", ".join(f"{value:.3f}" for value in found)
                print(f"{study.setting:18} {method:24} {spacing:10} {np.mean(found):.3f} ({each})")


if __name__ == "__main__":
    main()
