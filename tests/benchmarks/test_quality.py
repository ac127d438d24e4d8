"""`make quality`: what is asked of methods, the figures that are kept, and the pages of them."""

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import spearmanr

import influence_kit
from benchmarks.quality import __main__ as command
from benchmarks.quality.documents import FIRST, LAST, choosing, for_large_models, with_part
from benchmarks.quality.figures import Figure, Figures, Metrics, Row, Scores, read, write
from benchmarks.quality.page import page, short_defaults, standings, summary
from benchmarks.quality.studies import (
    DAMPINGS,
    Study,
    metric_studies,
    metrics_of,
    score_studies,
    scores_of,
    variants_of,
)
from benchmarks.settings import SETTINGS, Sizes
from benchmarks.settings.kept_scores import Variant
from benchmarks.settings.plan import Plan, Result
from influence_kit.errors import CurvatureError
from influence_kit.evaluation import half_subsets
from influence_kit.methods.influence_functions.fitted_inverse import FittedInverse

WINE, EKFAC, CG = "wine-lr", "EKFACInfluenceFunction", "CGInfluenceFunction"
SPARSE = Scores(
    0.8,
    "2 halves",
    {
        "GradDot": Row(Figure(0.4, 0.01, 1.1)),
        "TracInCP": Row(run=Figure(0.5, 0.01, 5.0)),
        "DataInf": Row(Figure(0.42, 0.01, 3.0), sweep={"0.1": Figure(0.44, 0.01)}),
        EKFAC: Row(
            Figure(0.6, 0.02, 7.0),
            Figure(0.64, 0.01, 35.4),
            {"1e-06": None, "0.01": Figure(0.631, 0.02), "0.1": Figure(0.5, 0.01)},
        ),
        CG: Row(
            Figure(0.66, None, 60.0),
            Figure(0.72, 0.01, 300.0),
            {"0.1": Figure(0.71, 0.01), "1": Figure(0.5, 0.01)},
        ),
    },
)
TEXTS = Scores(
    0.5,
    "3 halves",
    {
        "GradDot": Row(Figure(0.1, 0.01, 1.2)),
        "TracInCP": Row(run=Figure(0.2, 0.01, 5.0)),
        "DataInf": Row(Figure(0.12, 0.01, 3.0), sweep={"0.1": Figure(0.12, 0.01)}),
        EKFAC: Row(Figure(0.3, 0.02, 6.0), Figure(0.4, 0.01, 30.0), {"1": Figure(0.33, 0.02)}),
        CG: Row(Figure(0.3, 0.01, 90.0), Figure(0.4, 0.01, 450.0), {"1": Figure(0.3501, 0.01)}),
    },
)
CONVEX = Scores(
    None,
    "one model",
    {
        "ExplicitInfluenceFunction": Row(Figure(0.9, 0.01, 3.0)),
        EKFAC: Row(Figure(0.8, 0.01, 7.0)),
    },
)
OTHERS = {
    "digits-mlp": Metrics("wrong labels", {"GradDot": {"AUC": Figure(0.99, 0.001)}}),
    "digits-lr": Metrics(
        "left out", {"GradDot": {"LOO": Figure(0.5), "LOO, ranks": Figure(0.25, 0.1)}}
    ),
}
FIGURES = Figures("torch 9, abacus", {"sparse": SPARSE, "texts": TEXTS, WINE: CONVEX}, OTHERS)


def test_the_best_of_a_sweep_is_the_highest_that_was_not_refused():
    assert SPARSE.rows[EKFAC].best == ("0.01", Figure(0.631, 0.02))
    assert SPARSE.rows["GradDot"].best is None
    assert Row(Figure(0.3), sweep={"0.1": None}).best is None


@pytest.mark.parametrize(
    ("method", "missing", "is_short"),
    [(EKFAC, 0.03, False), (EKFAC, 0.031, True), ("LoGra", 0.05, False), ("LoGra", 0.0501, True)],
)
def test_a_default_is_marked_beyond_what_is_tolerated(method, missing, is_short):
    row = Row(Figure(0.6), sweep={"1": Figure(round(0.6 + missing, 4))})
    assert row.is_short(method) == is_short


def test_a_default_is_not_marked_where_nothing_was_swept():
    assert not SPARSE.rows["TracInCP"].is_short("TracInCP")
    assert not SPARSE.rows["GradDot"].is_short("GradDot")


def test_figures_come_back_from_their_file(tmp_path):
    path = tmp_path / "quality.json"
    assert read(path) == Figures()
    write(FIGURES, path)
    assert read(path) == FIGURES
    lines = path.read_text().splitlines()
    assert json.loads(path.read_text())["made"] == "torch 9, abacus"
    # a line for a method, so that a change shows as one
    assert sum('"EKFACInfluenceFunction": {' in line for line in lines) == 3
    assert '"last": [0.6, 0.02, 7.0]' in next(line for line in lines if EKFAC in line)


def test_a_figure_is_a_rounded_result():
    result = Result("LDS", "LoGra", (0.1, 0.20005), 0.050025, 1.0)
    assert Figure.of(result, passes=1.26) == (0.15, 0.05, 1.3)
    assert str(Figure.of(result)) == "0.150 ± 0.050"
    assert str(Figure(0.5)) == "0.500"


def test_methods_that_are_judged_again_replace_their_figures_and_no_others():
    again = Scores(0.9, "more halves", {"GradDot": Row(Figure(0.2)), "GradCos": Row(Figure(0.3))})
    found = FIGURES.with_scores("sparse", again)
    assert found.scores["sparse"].ceiling == 0.9
    assert found.scores["sparse"].rows["GradDot"] == Row(Figure(0.2))
    assert found.scores["sparse"].rows[EKFAC] == SPARSE.rows[EKFAC]
    # in the order of the methods and of the settings, whatever came first
    assert list(found.scores["sparse"].rows)[:3] == ["GradDot", "GradCos", "TracInCP"]
    assert next(iter(found.with_scores("mnist-lr", again).scores)) == "mnist-lr"
    changed = found.with_metrics("digits-lr", Metrics("", {"TRAK": {"LOO": Figure(0.7)}}))
    assert list(changed.metrics["digits-lr"].rows) == ["GradDot", "TRAK"]


def test_the_summary_has_shares_of_the_ceiling_and_passes():
    lines = summary({"sparse": SPARSE, "texts": TEXTS}).splitlines()
    assert lines[0] == "| method | `sparse` | `texts` | mean | passes |"
    assert lines[2] == "| `GradDot` | 0.50 | 0.20 | 0.35 | 1 |"
    assert lines[3] == "| `TracInCP` | 0.62 | 0.40 | 0.51 | 5 |"
    assert lines[5] == f"| `{EKFAC}` | 0.75 / 0.80 | 0.60 / 0.80 | 0.80 | 6 to 7 / 30 to 35 |"
    # where all seeds give one model, the ceiling is 1
    assert (
        summary({WINE: CONVEX}).splitlines()[2].startswith("| `ExplicitInfluenceFunction` | 0.90")
    )


def test_methods_stand_by_their_mean_over_settings_that_all_were_judged_in():
    only = Scores(0.5, "", {"GradDot": Row(Figure(0.5, None, 1.0))})
    found = standings({"sparse": SPARSE, "texts": TEXTS, "concrete": only})
    assert [one.method for one in found] == [CG, EKFAC, "TracInCP", "DataInf", "GradDot"]
    assert found[0].share == pytest.approx((0.72 / 0.8 + 0.4 / 0.5) / 2)
    assert found[0].passes == 450
    assert for_large_models({"sparse": SPARSE, "texts": TEXTS}).method == EKFAC


def test_defaults_that_are_short_are_marked_and_named():
    text = page(FIGURES)
    assert f"| `{EKFAC}` | **0.600 ± 0.020** | 0.640 ± 0.010 | 0.631 ± 0.020 | 0.01 |" in text
    assert f"| `{CG}` | 0.660 | 0.720 ± 0.010 | 0.710 ± 0.010 | 0.1 |" in text
    assert f"| `{CG}` | **0.300 ± 0.010** | 0.400 ± 0.010 | 0.350 ± 0.010 | 1 |" in text
    assert f"| `{EKFAC}` | 0.300 ± 0.020 | 0.400 ± 0.010 | 0.330 ± 0.020 | 1 |" in text
    named = short_defaults(FIGURES)
    assert named.count("\n- ") == 2
    assert f"- `{EKFAC}` in `sparse`: 0.600; 0.631 at 0.01." in named
    assert f"- `{CG}` in `texts`: 0.300; 0.350 at 1." in named
    assert "None." in short_defaults(replace(FIGURES, scores={WINE: CONVEX}))


def test_the_page_has_every_setting_with_its_ceiling():
    text = page(FIGURES)
    assert "(torch 9, abacus)" in text
    assert "## sparse features, MLP 800-32-2 (`sparse`)\n\n2 halves. Noise ceiling 0.800." in text
    assert "(`wine-lr`)\n\nOne model. Noise ceiling 1." in text
    assert "(`digits-lr`): other metrics\n\nLeft out. LOO:" in text
    assert "| GradDot | 0.500 | 0.250 ± 0.100 |" in text


def test_sentences_of_the_choosing_page_count_for_themselves():
    text = choosing(FIGURES)
    assert f"is `{CG}`: 0.85 of the ceiling, for up to 450 passes" in text
    assert f"With at most 50 passes, `{EKFAC}` is best and reaches 0.80." in text
    assert "better than the last checkpoint alone in 4 of 4 cases" in text
    assert f"`{CG}` by 0.14, `{EKFAC}` by 0.1" in text
    assert f"`DataInf` in 2 of 2, `{EKFAC}` in 1 of 2, `{CG}` in 1 of 2 settings" in text
    assert "better than `GradDot` by 0.04 at most, and by 0.03 on average" in text
    assert "an LDS of 0.90 to 0.90, EK-FAC 0.80 to 0.80" in text
    assert "| `GradDot` | 0.990 | 0.500 | 0.250 |" in text


def test_defaults_below_the_cosine_are_named():
    assert "GradCos` (over" not in choosing(FIGURES)
    rows = {**SPARSE.rows, "GradCos": Row(Figure(0.52))}
    found = {**FIGURES.scores, "sparse": replace(SPARSE, rows=rows)}
    text = choosing(replace(FIGURES, scores=found))
    told = "`GradDot` in `sparse`; `TracInCP` in `sparse`; `DataInf` in `sparse`."
    assert f"**Defaults below `GradCos`** (over the run, where they take one): {told}" in text


def test_a_part_of_a_page_is_replaced_between_its_marks():
    assert with_part(f"a\n{FIRST}\nold\n{LAST}\nb", "new\n") == f"a\n{FIRST}\nnew\n{LAST}\nb"
    with pytest.raises(ValueError, match="the page has 0 parts between"):
        with_part("a page", "new")


def test_what_a_method_is_asked():
    assert list(variants_of("GradDot", has_run=True)) == [Variant("GradDot")]
    assert list(variants_of("TracInCP", has_run=True)) == [Variant("TracInCP", over_run=True)]
    assert list(variants_of("TracInCP", has_run=False)) == [Variant("TracInCP")]
    assert list(variants_of("TRAK-10", has_run=True)) == [Variant("TRAK-10")]
    assert list(variants_of(CG, True, is_brief=True)) == [Variant(CG)]
    assert list(variants_of("SOURCE", True)) == [Variant("SOURCE", over_run=True)]
    both = [Variant("LoGra"), Variant("LoGra", over_run=True)]
    assert list(variants_of("LoGra", True, has_sweep=False)) == both
    found = list(variants_of("LoGra", has_run=True))
    assert found[0] == Variant("LoGra")
    assert [one.damping for one in found[1:-1]] == DAMPINGS
    assert found[-1] == Variant("LoGra", over_run=True)
    iterated = [one.damping for one in variants_of(CG, has_run=False)][1:]
    assert iterated == pytest.approx([1e-4, 1e-3, 0.01, 0.1, 1, 10])
    assert DAMPINGS[0] == 1e-6
    assert DAMPINGS[-1] == 10
    ridges = [one.damping for one in variants_of("TRAK", has_run=False)][1:]
    assert (min(ridges), max(ridges)) == pytest.approx((1e-4, 1e3))


def small(methods, **plan):
    return Study(WINE, Plan(methods, **plan), "a few halves")


@pytest.fixture(scope="module")
def wine():
    return SETTINGS[WINE].load(sizes=Sizes(40, 6))


def test_scores_are_put_together_right(wine, tmp_path):
    kept = []
    scores_of(small(["GradDot", EKFAC], subsets=5), wine, tmp_path, kept.append)
    assert [list(one.rows) for one in kept] == [["GradDot"], ["GradDot", EKFAC]]
    assert kept[0].ceiling is None
    setting, halves = SETTINGS[WINE], half_subsets(40, 5)
    model = setting.train(wine)
    outputs = [
        setting.measure(setting.train(wine, half.nonzero()[:, 0]), wine.test) for half in halves
    ]
    method = influence_kit.EKFACInfluenceFunction(
        model, wine.train, [model.state_dict()], loss_fn=setting.loss_fn
    )
    for damping in ("auto", 0.01):
        method.damping = damping
        predicted = method.influence(wine.test.tensors).double() @ halves.double().T
        each = [
            spearmanr(predicted[t], [output[t] for output in outputs]).statistic for t in range(6)
        ]
        row = kept[1].rows[EKFAC]
        found = row.last if damping == "auto" else row.sweep["0.01"]
        assert found.mean == pytest.approx(np.mean(each), abs=1e-4)
        assert found.error == pytest.approx(np.std(each, ddof=1) / 6**0.5, abs=1e-4)
    assert row.run is None
    assert row.last.passes > 2
    assert row.sweep["0.01"].passes is None


@pytest.mark.filterwarnings("ignore::influence_kit.errors.DampingWarning")
def test_a_damping_that_is_refused_has_no_figure(wine, tmp_path, monkeypatch):
    def refused(self, *args):
        if self.damping == DAMPINGS[0] or (self.is_auto and is_strict):
            raise CurvatureError("singular")
        return made(self, *args)

    made = FittedInverse.fit
    monkeypatch.setattr(FittedInverse, "fit", refused)
    kept, is_strict = [], False
    scores_of(small(["LoGra"], subsets=3), wine, tmp_path, kept.append)
    assert [damping for damping, one in kept[0].rows["LoGra"].sweep.items() if one is None] == [
        "1e-06"
    ]
    is_strict = True
    with pytest.raises(CurvatureError, match="singular"):  # the default must be there
        scores_of(small(["LoGra"], subsets=3), wine, tmp_path / "other", kept.append)


def test_other_metrics_are_put_together_right(wine, tmp_path):
    found = metrics_of(small(["GradDot"], left_out=3, wrong_share=0.2), wine, tmp_path)
    assert found.remark == "a few halves"
    assert list(found.rows["GradDot"]) == ["LOO", "LOO, ranks", "AUC", "recall at 10%"]
    assert list(found.rows["(last loss)"]) == ["AUC", "recall at 10%"]


def test_every_study_can_be_done():
    for study in [*score_studies(1), *metric_studies(1)]:
        study.plan.check(SETTINGS[study.setting])
        assert study.of_methods(["TRAK"]).plan.methods in (["TRAK"], [])
    needing = {study.setting for study in score_studies(1) if study.needs}
    assert {"texts", "mnist-pixels", "cifar2-cnn", "concrete", "mnist-mlp"} < needing
    assert "sparse" not in needing


def test_a_study_may_have_sizes_of_its_own():
    (one,) = [study for study in score_studies(1) if study.sizes is not None]
    assert (one.setting, one.sizes) == ("mnist-mlp", (5000, 60))
    assert one.remark.endswith(", three target models, 60 test examples")
    own = replace(small(["GradDot"], subsets=2), sizes=Sizes(20, 3)).load(None)
    assert (len(own.train), len(own.test)) == (20, 3)


def test_the_command_keeps_what_it_finds(tmp_path, monkeypatch, capsys):
    setting = replace(SETTINGS[WINE], sizes=Sizes(40, 6))
    monkeypatch.setitem(SETTINGS, WINE, setting)
    texts = Study("texts", Plan(["GradDot"], subsets=3), "none")
    scores = [texts, small(["GradDot", "GradCos"], subsets=3)]
    monkeypatch.setattr(command, "score_studies", lambda processes: scores)
    others = [small(["GradDot"], left_out=3)]
    monkeypatch.setattr(command, "metric_studies", lambda processes: others)
    path = tmp_path / "quality.json"
    arguments = ["--out", str(tmp_path), "--json", str(path)]
    command.main([*arguments, "--methods", "GradDot"])
    assert "texts: left out; give --data, a folder with input.txt" in capsys.readouterr().out
    assert list(read(path).scores[WINE].rows) == ["GradDot"]
    assert list(read(path).metrics[WINE].rows) == ["GradDot"]
    assert "torch" in read(path).made
    command.main([*arguments, "--only", WINE, "--methods", "GradCos"])
    assert "left out" not in capsys.readouterr().out
    assert list(read(path).scores[WINE].rows) == ["GradDot", "GradCos"]


def test_the_command_makes_the_pages_of_the_figures(tmp_path, monkeypatch):
    path = tmp_path / "quality.json"
    write(FIGURES, path)
    for module, name, text in (
        (command, "FILE", None),
        (command.documents, "PAGE", ""),
        (command.documents, "CHOOSING", f"before\n{FIRST}\n{LAST}\nafter"),
    ):
        place = path if text is None else tmp_path / f"{name}.md"
        if text is not None:
            place.write_text(text)
        monkeypatch.setattr(module, name, place)
    command.main(["--render", "--json", str(path)])
    assert (tmp_path / "PAGE.md").read_text() == page(FIGURES)
    assert choosing(FIGURES) in (tmp_path / "CHOOSING.md").read_text()
