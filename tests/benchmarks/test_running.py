"""A run: its figures against parts put together by hand, and the command line."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import roc_auc_score
from torch import nn

import influence_kit
from benchmarks.settings import SETTINGS, Sizes, Trained
from benchmarks.settings.__main__ import main
from benchmarks.settings.kept_scores import Variant, scored
from benchmarks.settings.methods import METHODS, Question, last_linear, make_method
from benchmarks.settings.models.perceptrons import perceptron
from benchmarks.settings.plan import Plan, Result
from benchmarks.settings.recipes import MiniBatches, WarmupCosine
from benchmarks.settings.run import report, run
from benchmarks.settings.workplace import Workplace
from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation import half_subsets

WINE = SETTINGS["wine-lr"]
# TRAK's default, with few examples
pytestmark = pytest.mark.filterwarnings("ignore:.*training examples have features of 512 entries")


@pytest.fixture(scope="module")
def wine():
    return WINE.load(sizes=Sizes(40, 6))


def by_name(results):
    return {(one.metric, one.method): one for one in results}


def explicit(data, model):
    return influence_kit.ExplicitInfluenceFunction(
        model, data.train, [model.state_dict()], loss_fn=WINE.loss_fn, damping=0.01
    )


def test_the_datamodeling_score_is_put_together_right(wine, tmp_path):
    names = ["GradDot", "ExplicitInfluenceFunction"]
    results = by_name(run(WINE, wine, Plan(names, subsets=5, targets=3, seed=4), tmp_path))
    model = WINE.train(wine)
    scores = explicit(wine, model).influence(wine.test.tensors).numpy()
    halves = half_subsets(40, 5, seed=4)
    predicted = scores @ halves.double().numpy().T
    outputs = [WINE.measure(WINE.train(wine, half.nonzero()[:, 0]), wine.test) for half in halves]
    real = torch.stack(outputs).T.numpy()
    expected = [spearmanr(predicted[t], real[t]).statistic for t in range(6)]
    found = results["LDS", "ExplicitInfluenceFunction"]
    # all seeds give one minimum: one target, and the error over test examples
    assert found.values == pytest.approx([np.mean(expected)])
    assert found.error == pytest.approx(np.std(expected, ddof=1) / 6**0.5)
    assert found.seconds > 0
    assert set(results) == {("LDS", name) for name in names}
    kept = np.load(tmp_path / "scores" / "ExplicitInfluenceFunction-target0.npz")
    assert np.allclose(kept["scores"], scores)


def test_leaving_out_is_put_together_right(wine, tmp_path):
    plan = Plan(["ExplicitInfluenceFunction"], left_out=4, seed=2)
    results = by_name(run(WINE, wine, plan, tmp_path))
    model = WINE.train(wine)
    scores = explicit(wine, model).influence(wine.test.tensors).numpy()
    places = torch.randperm(40, generator=torch.Generator().manual_seed(2))[:4].tolist()
    whole = WINE.measure(model, wine.test)
    differences = [
        whole - WINE.measure(WINE.train(wine, [i for i in range(40) if i != place]), wine.test)
        for place in places
    ]
    real = torch.stack(differences).T.numpy()
    for metric, correlation in (("LOO", pearsonr), ("LOO, ranks", spearmanr)):
        expected = [correlation(scores[t, places], real[t]).statistic for t in range(6)]
        assert results[metric, plan.methods[0]].mean == pytest.approx(np.mean(expected), abs=1e-3)
        assert results[metric, plan.methods[0]].mean > 0.9


def test_no_more_are_left_out_than_there_are(wine, tmp_path):
    with pytest.raises(InvalidArgumentError, match=r"41 examples cannot be left out .* are 40"):
        run(WINE, wine, Plan(["GradDot"], left_out=41), tmp_path)


def test_wrong_labels_are_put_together_right(tmp_path):
    data = WINE.load(sizes=Sizes(60, 6))
    plan = Plan(["GradDot", "KNNShapley"], wrong_share=0.2, targets=2, seed=5)
    results = by_name(run(WINE, data, plan, tmp_path))
    aucs, losses = [], []
    for target in range(2):
        changed, is_wrong = data.with_wrong_labels(0.2, 5 + target)
        model = WINE.train(changed, seed=target)
        method = influence_kit.GradDot(
            model, changed.train, [model.state_dict()], loss_fn=WINE.loss_fn
        )
        aucs.append(roc_auc_score(is_wrong, method.self_influence()))
        inputs, targets = changed.train.tensors
        with torch.no_grad():
            losses.append(roc_auc_score(is_wrong, WINE.loss_fn(model(inputs), targets)))
    assert results["AUC", "GradDot"].values == pytest.approx(aucs)
    assert results["AUC", "GradDot"].error == pytest.approx(abs(aucs[0] - aucs[1]) / 2)
    assert results["AUC", "(last loss)"].values == pytest.approx(losses)
    assert results["AUC", "(mean loss)"].values == pytest.approx(losses)  # of one checkpoint
    assert results["recall at 10%", "GradDot"].mean > 0.3


def test_target_models_differ_by_seed(tmp_path):
    data = TINY_MLP.load(sizes=Sizes(64, 5))
    plan = Plan(["GradDot", "TracInCP", "TRAK-2"], subsets=4, repeats=2, targets=2, checkpoints=2)
    results = by_name(run(TINY_MLP, data, plan, tmp_path))
    found = results["LDS", "GradDot"]
    assert len(set(found.values)) == 2
    assert found.error == pytest.approx(abs(found.values[0] - found.values[1]) / 2)
    # an average over members that do not depend on the target
    assert len(set(results["LDS", "TRAK-2"].values)) == 1
    assert results["LDS", "(noise ceiling)"].error is None
    # four halves with two seeds, two members
    assert len(list((tmp_path / "models").glob("*.safetensors"))) == 10


def tiny(tmp_path, **plan):
    data = TINY_MLP.load(sizes=Sizes(64, 5))
    return Workplace(TINY_MLP, data, Plan(["GradDot"], subsets=4, **plan), tmp_path)


@pytest.mark.parametrize(
    ("name", "keywords"),
    [("EKFACInfluenceFunction", {"damping": 0.25}), ("TRAK", {"ridge": 64 * 0.25})],
)
def test_a_damping_takes_the_place_of_the_default(name, keywords, tmp_path):
    workplace = tiny(tmp_path)
    # a method that is fitted is asked again
    for variant in (Variant(name), Variant(name, damping=3.0), Variant(name, damping=0.25)):
        found = workplace.scored(variant, 1).scores
    data, target = workplace.data, TINY_MLP.train_with_checkpoints(workplace.data, 5, seed=1)
    method = getattr(influence_kit, name)(
        target.model,
        data.train,
        target.checkpoints[-1:],
        loss_fn=TINY_MLP.loss_fn,
        **keywords,
    )
    torch.testing.assert_close(found, method.influence(data.test.tensors))


def test_a_method_over_the_run_takes_all_checkpoints(tmp_path):
    workplace = tiny(tmp_path, checkpoints=2)
    found = workplace.scored(Variant("LoGra", over_run=True, damping=0.1), 0)
    target = TINY_MLP.train_with_checkpoints(workplace.data, 2)
    each = [
        influence_kit.LoGra(
            target.model,
            workplace.data.train,
            [checkpoint],
            loss_fn=TINY_MLP.loss_fn,
            damping=0.1,
        ).influence(workplace.data.test.tensors)
        for checkpoint in target.checkpoints
    ]
    torch.testing.assert_close(found.scores, torch.stack(each).mean(0), rtol=1e-4, atol=1e-5)


def test_passes_are_examples_that_go_forward(wine):
    class Twice:
        def influence(self, batch):
            model(wine.train.tensors[0][:10])
            return model(batch[0])

    model = WINE.new_model(wine)
    found = scored(Twice, model, wine.train, wine.test)
    assert found.passes == pytest.approx((10 + 6) / (40 + 6))
    assert torch.equal(found.scores, model(wine.test.tensors[0]))
    assert not model._forward_hooks


def test_scores_are_kept_until_the_code_or_the_checkpoints_change(tmp_path, monkeypatch):
    variant = Variant("GradDot")
    first = tiny(tmp_path).scored(variant, 0)
    made = []
    monkeypatch.setattr(Workplace, "method", lambda *args: made.append(args) or 1 / 0)
    again = tiny(tmp_path).scored(variant, 0)
    assert torch.equal(again.scores, first.scores)
    assert again[1:] == first[1:]
    assert made == []
    with pytest.raises(ZeroDivisionError):
        tiny(tmp_path, checkpoints=3).scored(variant, 0)
    monkeypatch.setattr("benchmarks.settings.kept_scores.hash_of_code", lambda: "other")
    with pytest.raises(ZeroDivisionError):
        tiny(tmp_path).scored(variant, 0)


def test_a_run_goes_on_where_it_was(wine, tmp_path, monkeypatch):
    plan = Plan(["GradDot"], subsets=3)
    first = run(WINE, wine, plan, tmp_path)
    trained = []
    monkeypatch.setattr(
        type(WINE), "train", lambda self, *args, **kwargs: trained.append(args) or 1 / 0
    )
    assert [one.values for one in run(WINE, wine, plan, tmp_path)] == [one.values for one in first]
    assert trained == []


def test_a_folder_of_other_data_is_refused(wine, tmp_path):
    run(WINE, wine, Plan(["GradDot"], subsets=2), tmp_path)
    changed, _ = wine.with_wrong_labels(0.5, 0)
    with pytest.raises(InvalidArgumentError, match="were trained otherwise"):
        run(WINE, changed, Plan(["GradDot"], subsets=2), tmp_path)


@pytest.mark.parametrize(
    ("name", "plan", "message"),
    [
        ("wine-lr", Plan(["Graddot"], subsets=2), "no method is called 'Graddot'; there are GradD"),
        ("wine-lr", Plan(["TRAK-0"], subsets=2), "no method is called 'TRAK-0'"),
        ("wine-lr", Plan(["TracInCP-3"], subsets=2), "TracInCP follows one training run, not"),
        ("wine-lr", Plan(["TRAK"], subsets=-1), "`subsets` is -1; it must be at least 0"),
        ("wine-lr", Plan(["TRAK"], subsets=2, targets=0), "`targets` is 0; it must be at least 1"),
        ("wine-lr", Plan(["TRAK"]), "wine-lr is judged by LOO, LDS, AUC; asked for was nothing"),
        ("help-gpt", Plan(["TRAK"], wrong_share=0.1), "is judged by LDS; asked for was AUC"),
        ("digits-mlp", Plan(["TRAK"], left_out=3), "judged by LDS, AUC; asked for was LOO"),
    ],
)
def test_what_a_setting_does_not_have_is_refused_before_training(name, plan, message, tmp_path):
    with pytest.raises(InvalidArgumentError, match=message):
        run(SETTINGS[name], None, plan, tmp_path)


TINY_MLP = replace(
    SETTINGS["digits-mlp"],
    network=lambda data: perceptron((data.inputs, 4, data.outputs)),
    recipe=MiniBatches(4, 16, 0.1, momentum=0.9),
)
# a thousand steps, and curvature of what is hardly trained: too slow, or refused with a reason
SLOW = ["LiSSAInfluenceFunction", "CGInfluenceFunction", "NystromInfluenceFunction"]
CASES = [
    *((WINE, kind) for kind in METHODS if kind not in (SLOW[0], "SOURCE", "LESS")),
    *((TINY_MLP, kind) for kind in METHODS if kind not in (*SLOW, "LESS")),
    (replace(TINY_MLP, recipe=MiniBatches(4, 16, 0.01, "adamw")), "LESS"),
    *(
        (SETTINGS["diabetes-ridge"], kind)
        for kind in ("TRAK", "KNNShapley", "EKFACInfluenceFunction")
    ),
]


@pytest.mark.parametrize(("setting", "kind"), CASES, ids=[f"{s.name} {kind}" for s, kind in CASES])
def test_every_method_scores_a_setting(setting, kind):
    data = setting.load(sizes=Sizes(24, 3))
    trained = setting.train_with_checkpoints(data, 2)
    method = make_method(kind, Question(setting, data, trained))
    assert type(method) is getattr(influence_kit, kind)
    scores = method.influence(data.test.tensors)
    assert scores.shape == (3, 24)
    assert scores.isfinite().all()


def test_methods_of_training_get_all_checkpoints_and_others_the_last():
    data = TINY_MLP.load(sizes=Sizes(64, 3))
    trained = TINY_MLP.train_with_checkpoints(data, 4)
    question = Question(TINY_MLP, data, trained)
    assert len(make_method("TracInCP", question).checkpoints) == 4
    assert make_method("GradDot", question).checkpoints == trained.checkpoints[-1:]
    members = [c["state_dict"] for c in trained.checkpoints[:2]]
    assert make_method("TRAK-2", question._replace(members=members)).checkpoints == members


def test_source_gets_the_sums_of_the_learning_rates():
    data = TINY_MLP.load(sizes=Sizes(40, 3))
    question = Question(TINY_MLP, data, TINY_MLP.train_with_checkpoints(data, 3))
    source = make_method("SOURCE", question)
    # after epochs 1, 2 and 4, of three steps each, at 0.1 with momentum 0.9
    assert source.inverse.rate_sums == pytest.approx([3, 3, 6])


def test_methods_of_an_optimizer_refuse_others(wine):
    question = Question(WINE, wine, WINE.train_with_checkpoints(wine, 1))
    with pytest.raises(InvalidArgumentError, match="SOURCE follows SGD; wine-lr is trained by Min"):
        make_method("SOURCE", question)
    with pytest.raises(InvalidArgumentError, match="LESS follows Adam; wine-lr is trained by Min"):
        make_method("LESS", question)
    schedule = WarmupCosine(warmup=0.5, floor=0.1)
    slower = replace(TINY_MLP, recipe=replace(TINY_MLP.recipe, schedule=schedule))
    with pytest.raises(InvalidArgumentError, match="SOURCE follows SGD; digits-mlp is trained by"):
        make_method("SOURCE", question._replace(setting=slower))


def test_the_damping_of_a_minimum_is_its_weight_decay(wine):
    question = Question(WINE, wine, WINE.train_with_checkpoints(wine, 1))
    assert make_method("CGInfluenceFunction", question).damping == 0.01
    assert make_method("EKFACInfluenceFunction", question).damping == "auto"


def test_chosen_layers_stay_chosen(wine):
    model = perceptron((4, 3, 2))
    question = Question(replace(WINE, layers=("3",)), wine, Trained(model, [model.state_dict()]))
    assert make_method("EKFACInfluenceFunction", question).layers == ["3"]


def test_methods_of_trained_models_take_the_run_where_they_are_asked_over_it():
    data = TINY_MLP.load(sizes=Sizes(64, 3))
    trained = TINY_MLP.train_with_checkpoints(data, 3)
    question = Question(TINY_MLP, data, trained, over_run=True)
    for kind in ("LoGra", "KNNShapley", "RepresenterPointSelection"):
        assert make_method(kind, question).checkpoints == trained.checkpoints


def test_the_last_linear_layer_is_found():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2), nn.Identity())
    assert last_linear(model) == ("3", "2")
    with pytest.raises(InvalidArgumentError, match="a Linear has no linear layer after another"):
        last_linear(nn.Linear(3, 2))


def test_published_figures_stand_below_the_table():
    results = [
        Result("LDS", "GradDot", (0.25, 0.35), 0.05, 1.25),
        Result("LDS", "(noise ceiling)", (0.9,), None, None),
    ]
    text = report(SETTINGS["mnist-mlp"], results)
    assert "LDS     GradDot          0.300       0.050      1.2" in text
    assert "LDS     (noise ceiling)  0.900           -        -" in text
    assert re.search(r"LDS +TRAK-50 +0\.446 +dattri README, chart", text)
    assert "AUC" not in text  # nothing was measured by it
    assert "Published" not in report(WINE, results)


def test_the_list_names_all_settings(capsys):
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split()[0] for line in lines] == list(SETTINGS)
    assert "5000 x 500" in lines[0]
    assert "all x all" in lines[-2]


def test_the_command_line_runs_a_setting(capsys, tmp_path):
    arguments = "run wine-lr --methods GradDot TRAK --subsets 2 --train 30 --test 3 --out"
    assert main([*arguments.split(), str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("wine, logistic regression: 30 training and 3 test examples\n")
    assert printed.count("LDS") == 2
    assert (tmp_path / "results.txt").read_text() == printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("run mnist-lr --subsets 2 --data nowhere --out", "there is no folder nowhere"),
        ("run mnist-lr --subsets 2 --out", "name the folder that holds them"),
        ("run wine-lr --methods Dot --subsets 2 --out", "no method is called 'Dot'"),
        ("run wine-lr --subsets 2 --train 1000 --out", "1000 training examples were asked for"),
    ],
)
def test_the_command_line_says_what_is_wrong(capsys, tmp_path, arguments, message):
    assert main([*arguments.split(), str(tmp_path)]) == 1
    assert message in capsys.readouterr().err
