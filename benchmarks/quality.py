"""``make quality``: how good every method is in the settings that need no download.

Writes benchmarks/QUALITY.md: method by metric, with standard errors over target models (over test
examples where all seeds give one model). Everything trained is kept in a folder, so that a run that
is cut goes on. Seconds are not in the table: ``make bench`` measures those.
"""

import argparse
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.settings.catalog import SETTINGS
from benchmarks.settings.damping import Variant, by_damping
from benchmarks.settings.plan import Plan, Result
from benchmarks.settings.run import run
from benchmarks.settings.workplace import Workplace

PAGE = Path(__file__).with_name("QUALITY.md")
# one pass each
DIRECT = ["GradDot", "GradCos", "TracInCP", "DataInf"]
ITERATIVE = ["LiSSAInfluenceFunction", "NystromInfluenceFunction", "ArnoldiInfluenceFunction"]
KRONECKER = ["KFACInfluenceFunction", "EKFACInfluenceFunction"]
PROJECTED = ["LoGra", "GraSS", "FactGraSS", "TRAK"]
FEATURES = ["RepresenterPointSelection", "KNNShapley"]
EXPLICIT = "ExplicitInfluenceFunction"
# of the automatic damping
FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)


@dataclass(frozen=True)
class Study:
    """A setting and how much is done in it.

    Attributes:
        setting: its name.
        plan: how much is done.
        remark: what a reader of the page has to know.
        dampings: methods to judge at multiples of their damping, in place of the plan's methods.
    """

    setting: str
    plan: Plan
    remark: str
    dampings: Sequence[Variant] = ()

    def results(self, folder: Path) -> list[Result]:
        """All results; the folder keeps what is trained."""
        setting, folder = SETTINGS[self.setting], folder / self.setting
        data = setting.load()
        if self.dampings:
            workplace = Workplace(setting, data, self.plan, folder)
            return list(by_damping(workplace, self.dampings, FACTORS))
        return run(setting, data, self.plan, folder)


def studies(processes: int) -> list[Study]:
    """All of them, the quickest first."""
    convex = [*DIRECT, EXPLICIT, "CGInfluenceFunction", *KRONECKER, *PROJECTED, *FEATURES]
    regression = ["GradDot", "GradCos", EXPLICIT, "CGInfluenceFunction"]

    def at_minimum(name: str, methods: Sequence[str], left_out: int, wrong: float) -> Study:
        plan = Plan(
            methods,
            subsets=50,
            targets=3,
            left_out=left_out,
            wrong_share=wrong,
            processes=processes,
        )
        return Study(name, plan, "trained to the minimum, where all seeds give one model")

    digits = Plan(
        [
            *DIRECT,
            "TracInCPFast",
            EXPLICIT,
            *ITERATIVE,
            *KRONECKER,
            *PROJECTED,
            "TRAK-10",
            *FEATURES,
        ],
        subsets=100,
        repeats=10,
        targets=3,
        checkpoints=6,
        processes=processes,
    )
    dampings = [Variant("TRAK", {"projection_dim": size}) for size in (512, 1024, 2048, 4096)]
    dampings += [Variant(name) for name in ("DataInf", EXPLICIT, *KRONECKER, "LoGra")]
    wrong = Plan(
        [*DIRECT, *KRONECKER, *PROJECTED, *FEATURES],
        targets=3,
        wrong_share=0.1,
        checkpoints=5,
        processes=processes,
    )
    text = Plan(
        ["GradDot", "GradCos", "TracInCP", "DataInf", "EKFACInfluenceFunction", *PROJECTED],
        subsets=30,
        repeats=2,
        targets=3,
        processes=processes,
    )
    return [
        at_minimum("wine-lr", convex, 40, 0.1),
        at_minimum("breast-cancer-lr", convex, 40, 0.1),
        at_minimum("diabetes-ridge", regression, 40, 0.0),
        Study("digits-mlp", wrong, "a tenth of the labels wrong, others in each of three runs"),
        Study("digits-mlp", digits, "100 halves x 10 models; TRAK-10: ten models on halves"),
        at_minimum("digits-lr", convex, 20, 0.0),
        Study("help-gpt", text, "30 halves x 2 models"),
        Study(
            "digits-mlp", digits, "the LDS above at multiples of the automatic damping", dampings
        ),
    ]


def section(study: Study, results: Sequence[Result]) -> str:
    """A study's results: a row a method, a column a metric."""
    metrics = list(dict.fromkeys(result.metric for result in results))
    cells = {(result.method, result.metric): shown(result) for result in results}
    names = dict.fromkeys(result.method for result in results)
    setting = SETTINGS[study.setting]
    lines = [
        f"## {setting.title} (`{study.setting}`)",
        "",
        f"{study.remark[0].upper()}{study.remark[1:]}; methods with their defaults unless "
        "`benchmarks/settings/methods.py` says otherwise.",
        "",
        f"| method | {' | '.join(metrics)} |",
        f"| --- |{' --- |' * len(metrics)}",
    ]
    for name in names:
        row = " | ".join(cells.get((name, metric), "") for metric in metrics)
        lines.append(f"| {name} | {row} |")
    return "\n".join(lines)


def shown(result: Result) -> str:
    """The mean and its standard error."""
    return f"{result.mean:.3f}" + ("" if result.error is None else f" ± {result.error:.3f}")


HEAD = """# Quality

Written by `make quality` ({torch}, {machine}). LDS: linear datamodeling score, the mean Spearman
correlation of summed scores with the outputs of models trained on random halves; the noise ceiling
is what perfect scores would reach. LOO: correlation with really leaving examples out (Pearson, and
of ranks). AUC and recall: wrong labels found by self-influence, beside the loss; where a method is
not in that table it has no self-influence. Standard errors are over three target models, or over
test examples where there is one model.
"""


def main() -> None:
    """Run all studies, or some, and write the page."""
    parser = argparse.ArgumentParser("python -m benchmarks.quality", description=__doc__)
    folder = Path(tempfile.gettempdir()) / "influence_kit_quality"
    parser.add_argument(
        "--out", type=Path, default=folder, help="for models (default: %(default)s)"
    )
    parser.add_argument("--processes", type=int, default=2, help="in which models are trained")
    parser.add_argument("--only", nargs="+", choices=SETTINGS, help="some of the settings")
    given = parser.parse_args()
    parts = [HEAD.format(torch=f"torch {torch.__version__}", machine=platform.machine())]
    for study in studies(given.processes):
        if given.only and study.setting not in given.only:
            continue
        parts.append(section(study, study.results(given.out)))
        print(parts[-1], flush=True)
        if not given.only:
            PAGE.write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
