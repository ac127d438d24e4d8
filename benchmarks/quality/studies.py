"""What `make quality` does: which methods are judged in which settings, and how."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.quality.figures import Figure, Metrics, Row, Scores
from benchmarks.settings.catalog import SETTINGS
from benchmarks.settings.catalog_wide import WIDE
from benchmarks.settings.data import Data
from benchmarks.settings.kept_scores import Variant
from benchmarks.settings.methods import split_name
from benchmarks.settings.plan import Plan
from benchmarks.settings.run import over_targets, run, truth
from benchmarks.settings.workplace import Workplace
from influence_kit.errors import CurvatureError
from influence_kit.evaluation import RowCorrelation, linear_datamodeling_score

DIRECT = ["GradDot", "GradCos", "TracInCP", "DataInf"]
ITERATIVE = ["LiSSAInfluenceFunction", "NystromInfluenceFunction", "ArnoldiInfluenceFunction"]
CG, EXPLICIT = "CGInfluenceFunction", "ExplicitInfluenceFunction"
KRONECKER = ["KFACInfluenceFunction", "EKFACInfluenceFunction"]
PROJECTED = ["LoGra", "GraSS", "FactGraSS", "TRAK"]
FEATURES = ["RepresenterPointSelection", "KNNShapley"]
NETWORK = [*DIRECT, CG, *KRONECKER, *PROJECTED, *FEATURES]

# those with learning rates along a run, and those of one model
FOLLOWING = {"TracInCP", "TracInCPFast"}
OF_ONE = {"GradDot", "GradCos", "ArnoldiInfluenceFunction"}
DAMPED = {"DataInf", EXPLICIT, CG, *KRONECKER, *PROJECTED}
DAMPINGS = tuple(10.0**power for power in range(-6, 2))
CHECKPOINTS = 5


@dataclass(frozen=True)
class Study:
    """What is done in a setting.

    Attributes:
        setting: its name.
        plan: how much is done.
        remark: what a reader of the page has to know.
    """

    setting: str
    plan: Plan
    remark: str

    @property
    def needs(self) -> str:
        """The files that have to be in the folder of data."""
        return SETTINGS[self.setting].needs

    def load(self, folder: Path | None) -> Data:
        """The data of the setting, from the folder where it needs one."""
        return SETTINGS[self.setting].load(folder if self.needs else None)

    def of_methods(self, names: Sequence[str] | None) -> "Study":
        """The same for some of the methods; None is all."""
        methods = [name for name in self.plan.methods if names is None or name in names]
        return replace(self, plan=replace(self.plan, methods=methods))


def scores_of(study: Study, data: Data, folder: Path, after: Callable[[Scores], None]) -> None:
    """The linear datamodeling scores of a study; ``after`` gets them after each method."""
    workplace = Workplace(SETTINGS[study.setting], data, study.plan, folder / study.setting)
    subsets, outputs = truth(workplace)
    rows: dict[str, Row] = {}

    def judged(variant: Variant, seed: int) -> tuple[RowCorrelation, float]:
        found = workplace.scored(variant, seed)
        return linear_datamodeling_score(found.scores, subsets, outputs, "margin"), found.passes

    for name in study.plan.methods:
        rows[name], ceiling = _row(name, workplace, judged)
        after(Scores(ceiling, study.remark, dict(rows)))


Judge = Callable[[Variant, int], tuple[RowCorrelation, float]]


def _row(name: str, workplace: Workplace, judged: Judge) -> tuple[Row, float | None]:
    """A method's figures, and the noise ceiling."""
    kind, count = split_name(name)
    has_run = workplace.setting.recipe.epochs > 1
    found: dict[Variant, list[tuple[RowCorrelation, float]]] = {}
    variants = list(_variants(name, kind, has_run and not count))
    # all variants of one target model: they share a fit
    for seed in workplace.target_seeds:
        for variant in variants:
            try:
                found.setdefault(variant, []).append(judged(variant, seed))
            except CurvatureError:  # singular, or negative, at so small a damping
                if variant.damping is None:
                    raise
    figures: dict[Variant, Figure | None] = dict.fromkeys(variants)
    for variant, each in found.items():
        if len(each) == len(workplace.target_seeds):
            result = over_targets("LDS", name, [one for one, _ in each], None)
            passes = each[0][1] if variant.damping is None else None
            figures[variant] = Figure.of(result, passes)
    ceiling = found[variants[0]][0][0].ceiling
    row = Row(
        figures.get(Variant(name)),
        figures.get(Variant(name, over_run=True)),
        {f"{v.damping:g}": figures[v] for v in variants if v.damping is not None},
    )
    return row, None if ceiling is None else round(ceiling, 4)


def _variants(name: str, kind: str, has_run: bool) -> Iterator[Variant]:
    if kind not in FOLLOWING or not has_run:
        yield Variant(name)
    if kind in DAMPED and name == kind:
        yield from (Variant(name, damping=damping) for damping in DAMPINGS)
    if has_run and kind not in OF_ONE:
        yield Variant(name, over_run=True)


def metrics_of(study: Study, data: Data, folder: Path) -> Metrics:
    """The other metrics of a study."""
    rows: dict[str, dict[str, Figure]] = {}
    folder = folder / study.setting
    for result in run(SETTINGS[study.setting], data, study.plan, folder):
        rows.setdefault(result.method, {})[result.metric] = Figure.of(result)
    return Metrics(study.remark, rows)


def score_studies(processes: int) -> list[Study]:
    """The linear datamodeling scores: wide inputs first, then those of the other settings."""

    def network(name: str, methods: Sequence[str], subsets: int = 40, repeats: int = 2) -> Study:
        amounts = {"subsets": subsets, "repeats": repeats, "checkpoints": CHECKPOINTS}
        plan = Plan(methods, targets=3, processes=processes, **amounts)
        return Study(name, plan, f"{subsets} halves x {repeats} models, three target models")

    def at_minimum(name: str, methods: Sequence[str]) -> Study:
        plan = Plan(methods, subsets=50, processes=processes)
        return Study(
            name, plan, "50 halves; trained to the minimum, where all seeds give one model"
        )

    convex = [name for name in [*DIRECT, EXPLICIT, *NETWORK[len(DIRECT) :]] if name != "TracInCP"]
    wide = [one.name for one in WIDE if one.name != "concrete"]
    return [
        *(network(name, NETWORK) for name in wide),
        network("concrete", [*NETWORK, EXPLICIT], repeats=6),
        network("digits-mlp", [*NETWORK, EXPLICIT, *ITERATIVE, "TracInCPFast", "TRAK-10"], 100, 10),
        network("help-gpt", [n for n in NETWORK if n not in FEATURES], subsets=30),
        at_minimum("wine-lr", convex),
        at_minimum("breast-cancer-lr", convex),
        at_minimum("digits-lr", convex),
        at_minimum("diabetes-ridge", ["GradDot", "GradCos", EXPLICIT, CG]),
    ]


def metric_studies(processes: int) -> list[Study]:
    """Leaving examples out, and wrong labels."""

    def at_minimum(name: str, left_out: int, wrong: float) -> Study:
        names = [*DIRECT, EXPLICIT, *NETWORK[len(DIRECT) :]]
        if name == "diabetes-ridge":
            names = ["GradDot", "GradCos", EXPLICIT, CG]
        plan = Plan(names, targets=3, left_out=left_out, wrong_share=wrong, processes=processes)
        return Study(name, plan, "trained to the minimum, where all seeds give one model")

    digits = Plan(
        [*DIRECT, *KRONECKER, *PROJECTED, *FEATURES],
        targets=3,
        wrong_share=0.1,
        processes=processes,
    )
    return [
        at_minimum("wine-lr", 40, 0.1),
        at_minimum("breast-cancer-lr", 40, 0.1),
        at_minimum("diabetes-ridge", 40, 0.0),
        at_minimum("digits-lr", 20, 0.0),
        Study("digits-mlp", digits, "a tenth of the labels wrong, others in each of three runs"),
    ]
