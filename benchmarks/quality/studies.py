"""What `make quality` does: which methods are judged in which settings, and how."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from benchmarks.quality.figures import Figure, Metrics, Row, Scores
from benchmarks.settings.catalog import SETTINGS
from benchmarks.settings.catalog_wide import WIDE
from benchmarks.settings.data import Data, Sizes
from benchmarks.settings.kept_scores import Variant
from benchmarks.settings.methods import FOLLOWING, split_name
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
NETWORK = [*DIRECT, *KRONECKER, *PROJECTED, *FEATURES, CG]  # the slowest last
# where there is one checkpoint, TracInCP is GradDot
AT_MINIMUM = [EXPLICIT, *(name for name in NETWORK if name != "TracInCP")]
OF_VALUES = ["GradDot", "GradCos", EXPLICIT, CG]
MINIMUM = "trained to the minimum, where all seeds give one model"
# hundreds of products with the vectors of all test examples
CG_IS_SLOW = {"cifar2-cnn", "help-gpt", "mnist-mlp", "shakespeare-gpt"}
OWN_STUDIES = {"concrete", "concrete-mlp", "shakespeare-gpt"}

# those of one model
OF_ONE = {"GradDot", "GradCos", "ArnoldiInfluenceFunction"}
DAMPED = {"DataInf", EXPLICIT, CG, *KRONECKER, *PROJECTED}
DAMPINGS = [factor * 10.0**power for power in range(-6, 1) for factor in (1, 3)] + [10.0]
OWN_DAMPINGS = {
    # divided by n: gradients of margins are longer than those of losses
    "TRAK": [100 * damping for damping in DAMPINGS],
    # every other: it takes the longest; below them it does not converge in its 100 iterations
    CG: DAMPINGS[4::2],
}
CHECKPOINTS = 5


@dataclass(frozen=True)
class Study:
    """What is done in a setting.

    Attributes:
        setting: its name.
        plan: how much is done.
        remark: what a reader of the page has to know.
        brief: methods that take too long for more than the default at the last checkpoint.
        sizes: other sizes than those of the setting; None for its own.
        has_sweep: whether methods are asked with other dampings, too.
    """

    setting: str
    plan: Plan
    remark: str
    brief: Sequence[str] = ()
    sizes: Sizes | None = None
    has_sweep: bool = True

    @property
    def needs(self) -> str:
        """The files that have to be in the folder of data."""
        return SETTINGS[self.setting].needs

    def load(self, folder: Path | None) -> Data:
        """The data of the setting, from the folder where it needs one."""
        return SETTINGS[self.setting].load(folder if self.needs else None, self.sizes)

    def of_methods(self, names: Sequence[str] | None) -> "Study":
        """The same for some of the methods; None is all."""
        methods = [name for name in self.plan.methods if names is None or name in names]
        return replace(self, plan=replace(self.plan, methods=methods))


def scores_of(study: Study, data: Data, folder: Path, after: Callable[[Scores], None]) -> None:
    """The linear datamodeling scores of a study; ``after`` gets them after each method."""
    workplace = Workplace(SETTINGS[study.setting], data, study.plan, folder / study.setting)
    subsets, outputs = truth(workplace)
    has_run = workplace.setting.recipe.epochs > 1
    rows: dict[str, Row] = {}

    def judged(variant: Variant, seed: int) -> Judged:
        found = workplace.scored(variant, seed)
        score = linear_datamodeling_score(found.scores, subsets, outputs, "margin")
        return Judged(score, found.passes)

    for name in study.plan.methods:
        variants = list(variants_of(name, has_run, name in study.brief, study.has_sweep))
        figures, ceiling = _figures(variants, workplace.target_seeds, judged)
        rows[name] = Row(
            figures.get(Variant(name)),
            figures.get(Variant(name, over_run=True)),
            {f"{v.damping:g}": figures[v] for v in variants if v.damping is not None},
        )
        after(Scores(ceiling, study.remark, dict(rows)))


def variants_of(
    name: str, has_run: bool, is_brief: bool = False, has_sweep: bool = True
) -> Iterator[Variant]:
    """What a method is asked: its default and a sweep at the last checkpoint, and over the run."""
    kind, count = split_name(name)
    if kind not in FOLLOWING or not has_run:
        yield Variant(name)
    if is_brief or count:
        return
    if kind in DAMPED and has_sweep:
        yield from (Variant(name, damping=one) for one in OWN_DAMPINGS.get(kind, DAMPINGS))
    if has_run and kind not in OF_ONE:
        yield Variant(name, over_run=True)


class Judged(NamedTuple):
    """A variant at one target model."""

    score: RowCorrelation
    passes: float


def _figures(
    variants: Sequence[Variant], seeds: Sequence[int], judge: Callable[[Variant, int], Judged]
) -> tuple[dict[Variant, Figure | None], float | None]:
    """The figures of a method, and the noise ceiling."""
    found: dict[Variant, list[Judged]] = {variant: [] for variant in variants}
    # all variants of one target model in turn: they share a fit
    for seed in seeds:
        for variant in variants:
            try:
                found[variant].append(judge(variant, seed))
            except CurvatureError:  # singular, or negative, at so small a damping
                if variant.damping is None:
                    raise
    figures: dict[Variant, Figure | None] = dict.fromkeys(variants)
    for variant, each in found.items():
        if len(each) == len(seeds):
            passes = each[0].passes if variant.damping is None else None
            result = over_targets("LDS", variant.name, [one.score for one in each], None)
            figures[variant] = Figure.of(result, passes)
    ceiling = found[variants[0]][0].score.ceiling
    return figures, None if ceiling is None else round(ceiling, 4)


def metrics_of(study: Study, data: Data, folder: Path) -> Metrics:
    """The other metrics of a study."""
    rows: dict[str, dict[str, Figure]] = {}
    folder = folder / study.setting
    for result in run(SETTINGS[study.setting], data, study.plan, folder):
        rows.setdefault(result.method, {})[result.metric] = Figure.of(result)
    return Metrics(study.remark, rows)


def score_studies(processes: int) -> list[Study]:
    """The linear datamodeling scores: wide inputs first, then those of the other settings."""

    def network(
        name: str,
        methods: Sequence[str] = NETWORK,
        subsets: int = 40,
        repeats: int = 2,
        sizes: Sizes | None = None,
        has_sweep: bool = True,
    ) -> Study:
        plan = Plan(methods, subsets, repeats, 3, checkpoints=CHECKPOINTS, processes=processes)
        remark = f"{subsets} halves x {repeats} models, three target models"
        if sizes is not None:
            remark += f", {sizes.test} test examples"
        return Study(name, plan, remark, [CG] if name in CG_IS_SLOW else [], sizes, has_sweep)

    def at_minimum(name: str, methods: Sequence[str] = AT_MINIMUM) -> Study:
        plan = Plan(methods, subsets=50, processes=processes)
        return Study(name, plan, f"50 halves; {MINIMUM}")

    tokens = [name for name in NETWORK if name not in FEATURES]
    digits = [*NETWORK, EXPLICIT, *ITERATIVE, "TracInCPFast", "TRAK-10"]
    return [
        *(network(one.name) for one in WIDE if one.name not in OWN_STUDIES),
        network("concrete", [*NETWORK, EXPLICIT], repeats=6),
        network(
            "mnist-mlp", [*NETWORK, "SOURCE"], repeats=3, sizes=Sizes(5000, 60), has_sweep=False
        ),
        network("concrete-mlp", [*NETWORK, "SOURCE"], repeats=20, has_sweep=False),
        network("shakespeare-gpt", [*tokens, "LESS"], subsets=30, has_sweep=False),
        network("digits-mlp", digits, subsets=100, repeats=10),
        network("help-gpt", tokens, subsets=30),
        at_minimum("wine-lr"),
        at_minimum("breast-cancer-lr"),
        at_minimum("digits-lr"),
        at_minimum("diabetes-ridge", OF_VALUES),
    ]


def metric_studies(processes: int) -> list[Study]:
    """Leaving examples out, and wrong labels."""

    def at_minimum(
        name: str, left_out: int, wrong: float, methods: Sequence[str] = AT_MINIMUM
    ) -> Study:
        plan = Plan(methods, targets=3, left_out=left_out, wrong_share=wrong, processes=processes)
        return Study(name, plan, MINIMUM)

    digits = Plan(
        [*DIRECT, *KRONECKER, *PROJECTED, *FEATURES],
        targets=3,
        wrong_share=0.1,
        processes=processes,
    )
    return [
        at_minimum("wine-lr", 40, 0.1),
        at_minimum("breast-cancer-lr", 40, 0.1),
        at_minimum("diabetes-ridge", 40, 0.0, OF_VALUES),
        at_minimum("digits-lr", 20, 0.0),
        Study("digits-mlp", digits, "a tenth of the labels wrong, others in each of three runs"),
    ]
