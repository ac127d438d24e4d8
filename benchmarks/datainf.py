"""DataInf by its blocks and the scale of its damping: the table of ``sphinx/choosing.md``.

For each setting of ``make quality`` the linear datamodeling score of the last checkpoint, as a mean
over the target models: with one block for each layer and for each parameter, both with the damping
"auto" (0.1 times the mean of |g|^2 / p, for blocks of p parameters), and by layer with that of the
mean of |g|^2, not divided by p. Models trained on subsets are those that ``make quality`` keeps in
the same folder.

    python -m benchmarks.datainf --data folder --out folder [--only SETTING ...]
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.quality.page import table
from benchmarks.quality.studies import Study, score_studies
from benchmarks.settings.catalog import SETTINGS
from benchmarks.settings.run import truth
from benchmarks.settings.workplace import Workplace
from influence_kit.evaluation import linear_datamodeling_score

NAME = "DataInf"
STUDIES = {study.setting: study for study in score_studies(1) if NAME in study.plan.methods}


def scores(workplace: Workplace, seed: int) -> list[Tensor]:
    """By layer, by parameter, and by layer with the larger damping, for one target model."""
    test = workplace.data.test.tensors
    by_layer = workplace.method(NAME, seed)
    found = [
        by_layer.influence(test),
        workplace.method(NAME, seed, blocks="parameter").influence(test),
    ]
    model = workplace.target(seed).model
    by_layer.damping = {
        block: damping
        * sum(p.numel() for p in model.get_submodule(block).parameters(recurse=False))
        for block, damping in by_layer.damping_used[0].items()
    }
    return [*found, by_layer.influence(test)]


def row(study: Study, data: Path, folder: Path) -> list[str]:
    """The line of the table for a setting."""
    workplace = Workplace(
        SETTINGS[study.setting], study.load(data), study.plan, folder / study.setting
    )
    subsets, outputs = truth(workplace)
    each = [
        [linear_datamodeling_score(one, subsets, outputs, "margin").mean for one in found]
        for found in (scores(workplace, seed) for seed in workplace.target_seeds)
    ]
    means = torch.tensor(each).mean(0).tolist()
    return [f"`{study.setting}`", *(f"{mean:.3f}" for mean in means)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder with the data sets")
    parser.add_argument("--out", type=Path, required=True, help="for models on subsets")
    parser.add_argument("--only", nargs="+", choices=STUDIES, default=list(STUDIES))
    given = parser.parse_args()
    rows = [row(STUDIES[name], given.data, given.out) for name in given.only]
    print(table(["setting", "by layer", "by parameter", "by layer, undivided"], rows))


if __name__ == "__main__":
    main()
