"""Several checkpoints: what a method makes of the scores at each, and what it shows meanwhile.

What the page Concepts says of each class is compared with values.
"""

import re
from pathlib import Path

import pytest
import torch
from cases import CASES, Examples
from contract import METHODS, assert_close, build, scores

import influence_kit
from influence_kit import (
    TRAK,
    EKFACInfluenceFunction,
    LoGra,
    RepresenterPointSelection,
    TracInCP,
)
from influence_kit.curvature import EKFAC
from influence_kit.methods.influence_functions.influence_function import InfluenceFunction

CASE = CASES["mlp"]
PAGE = Path(__file__).parents[2] / "sphinx" / "concepts.md"
ROW = re.compile(r"^\| ((?:`\w+`(?:, )?)+) \| (.*) \|$", re.MULTILINE)
SECTION = PAGE.read_text().partition("## Several checkpoints")[2].partition("\n## ")[0]
# a class, and what the page says of it
SAYS = {name: says for names, says in ROW.findall(SECTION) for name in re.findall(r"\w+", names)}
# methods whose checkpoints share something that depends on the first, or that look at none
# (of the segments of SOURCE: ``test_source``)
OTHERS = {"GraSS, learnt", "KNNShapley", "SOURCE", "TRAK"}

of_all_features = pytest.mark.filterwarnings("ignore:11 training examples have features of 83")


def three():
    run = CASE.checkpoints()
    assert len(run) == len({checkpoint["learning_rate"] for checkpoint in run}) == 3
    return run


def alone_and_together(method: str, **arguments):
    """The scores at each of three checkpoints, by objects of their own, and over all of them."""
    run = METHODS[method].checkpoints(CASE)
    alone = [scores(build(method, CASE, checkpoints=[c], **arguments), CASE.test) for c in run]
    together = build(method, CASE, checkpoints=run, **arguments)
    return torch.stack(alone), scores(together, CASE.test)


def test_the_page_has_every_class():
    public = {name for name in influence_kit.__all__ if f"`{name}`" in PAGE.read_text()}
    classes = {name for name in public if hasattr(getattr(influence_kit, name), "influence")}
    assert classes == set(SAYS)
    assert {method.partition(",")[0] for method in METHODS} <= set(SAYS)


@pytest.mark.parametrize("method", sorted(METHODS.keys() - OTHERS))
def test_scores_over_checkpoints_are_combined_as_the_page_says(method):
    says = SAYS[method.partition(",")[0]]
    if says.startswith("one model"):
        assert METHODS[method].over_checkpoints in ("one", "first")
        return
    alone, together = alone_and_together(method)
    expected = {"the sum": alone.sum(0), "the mean": alone.mean(0)}
    assert_close(together, expected[re.match("the (sum|mean)", says)[0]], METHODS[method].close[0])


def test_tracin_weighs_by_learning_rate_and_graddot_does_not():
    assert "times its learning rate" in SAYS["TracInCP"]
    assert SAYS["GradDot"] == "the sum"
    rates = torch.tensor([c["learning_rate"] for c in three()], dtype=torch.float64)
    dots, summed = alone_and_together("GradDot")
    assert_close(alone_and_together("TracInCP")[1], (rates[:, None, None] * dots).sum(0))
    assert_close(summed, dots.sum(0))


@of_all_features
def test_trak_multiplies_the_means_of_its_two_parts():
    assert SAYS["TRAK"].startswith("two means, multiplied")
    # nothing is projected, since a projection is drawn for each number of a checkpoint
    alone, together = alone_and_together(
        "TRAK", projection="identity", projection_dim=10**4, ridge=0.5
    )
    slopes = []
    for checkpoint in three():
        model = CASE.model()
        model.load_state_dict(checkpoint["state_dict"])
        *inputs, labels = CASE.train
        right = model.eval()(*inputs).softmax(1).gather(1, labels[:, None])[:, 0]
        slopes.append(1 - right.detach())
    slope = torch.stack(slopes)
    expected = (alone / slope[:, None]).mean(0) * slope.mean(0)
    assert_close(together, expected, METHODS["TRAK"].close[0])
    assert not torch.allclose(together, alone.mean(0), rtol=1e-3)


def test_without_a_layer_the_neighbours_are_the_same_at_all_checkpoints():
    assert "without one, checkpoints are not used" in SAYS["KNNShapley"]
    alone, together = alone_and_together("KNNShapley")
    assert torch.equal(together, alone[0])
    assert torch.equal(together, alone[2])


def test_a_learnt_mask_is_that_of_the_first_checkpoint():
    alone, together = alone_and_together("GraSS, learnt")
    assert not torch.allclose(together, alone.mean(0), rtol=1e-3)


OF_SEVERAL = [m for m, method in METHODS.items() if method.over_checkpoints in ("mean", "other")]
FITTED = [m for m in OF_SEVERAL if m != "SOURCE" and isinstance(build(m, CASE), InfluenceFunction)]


@of_all_features
@pytest.mark.parametrize("method", FITTED)
def test_every_checkpoint_has_its_own_damping(method):
    # of drawn projections of TRAK, too, the second checkpoint has another
    arguments = {"projection": "identity", "projection_dim": 10**4} if method == "TRAK" else {}
    if method == "GraSS, learnt":
        arguments = {"mask": "random"}
    run = METHODS[method].checkpoints(CASE)
    alone = [build(method, CASE, checkpoints=[c], **arguments).fit().damping_used for c in run]
    together = build(method, CASE, checkpoints=run, **arguments).fit().damping_used
    values = torch.tensor([list(used.values()) for used in together])
    expected = torch.tensor([list(used[0].values()) for used in alone])
    if method == "TRAK":  # whose automatic ridge is less for several
        expected /= 3**0.5
    assert_close(values, expected, 1e-5)
    assert (values[0] != values[1]).any()


# What is shown.


def bars(capsys) -> list[str]:
    """What the bars of a call say that came to their end, in order."""
    found = re.findall(r"(Using [^:|\r]+): 100%\|[^|]*\| (\d+/\d+)", capsys.readouterr().err)
    return list(dict.fromkeys(f"{text} {count}" for text, count in found))


def test_a_question_shows_the_checkpoints_that_it_fits_and_later_ones_do_not(capsys):
    data = Examples(CASE.train)
    batches = -(-len(data) // 4)
    arguments = {"loss_fn": CASE.loss, "batch_size": 4}
    ekfac = EKFACInfluenceFunction(CASE.model(), data, three(), **arguments)
    name = "Using EKFACInfluenceFunction to"
    fits = f"{name} fit the curvature. Processing checkpoint 3/3"
    scored = f"{name} compute influence for training batches {3 * batches}/{3 * batches}"
    ekfac.influence(CASE.test, show_progress=True)
    assert bars(capsys) == [fits, scored]
    ekfac.influence(CASE.test, show_progress=True)
    assert bars(capsys) == [scored]
    ekfac.damping = 0.1
    ekfac.influence(CASE.test, show_progress=True)
    assert bars(capsys) == [scored]
    ekfac.forget()
    ekfac.self_influence(show_progress=True)
    assert bars(capsys)[0] == fits
    ekfac.forget()
    ekfac.influence_by_layer(CASE.test, show_progress=True)
    assert bars(capsys)[0] == fits
    ekfac.forget()
    ekfac.perturbation_influence(CASE.test, show_progress=True)
    assert bars(capsys)[0] == fits
    ekfac.forget()
    ekfac.influence(CASE.test)
    ekfac.forget()
    ekfac.fit()
    assert capsys.readouterr().err == ""
    ekfac.fit(show_progress=True)
    assert bars(capsys) == [fits]


@pytest.mark.parametrize("cls", [TRAK, LoGra])
@pytest.mark.parametrize("stored", [True, False], ids=["in a store", "in memory"])
def test_gradients_that_are_kept_have_a_bar_of_their_own(cls, stored, capsys, tmp_path):
    store = tmp_path / "store" if stored else None
    arguments = {"loss_fn": CASE.loss, "projection_dim": 4, "store": store}

    def make():
        return cls(CASE.model(), Examples(CASE.train), three(), **arguments)

    made = make()
    made.influence(CASE.test, show_progress=True)
    name = f"Using {cls.__name__} to"
    kept = f"{name} compute the gradients of the training set. Processing checkpoint 3/3"
    first, second, third = bars(capsys)
    assert (first, second.rpartition(" ")[2]) == (kept, "3/3")
    assert second.startswith(f"{name} fit ")
    made.influence(CASE.test, show_progress=True)
    assert bars(capsys) == [third]
    make().influence(CASE.test, show_progress=True)
    assert (kept in bars(capsys)) is not stored  # a store that is complete is only read
    assert capsys.readouterr().err == ""


def test_a_refit_and_a_store_of_plain_gradients_are_shown(capsys, tmp_path):
    arguments = {"loss_fn": CASE.loss, "batch_size": 4}
    points = RepresenterPointSelection(
        CASE.model(), CASE.final, Examples(CASE.train), three(), **arguments
    )
    points.influence(CASE.test, show_progress=True)
    name = "Using RepresenterPointSelection to"
    assert bars(capsys)[0] == f"{name} fit the last layer. Processing checkpoint 3/3"
    points.influence(CASE.test, show_progress=True)
    assert len(bars(capsys)) == 1
    stored = TracInCP(CASE.model(), Examples(CASE.train), three(), **arguments, store=tmp_path)
    stored.self_influence(show_progress=True)
    shown = bars(capsys)[0]
    assert shown.endswith("compute the gradients of the training set. Processing checkpoint 3/3")


def test_a_fit_that_was_broken_off_is_shown_where_it_goes_on(capsys, monkeypatch):
    ekfac = EKFACInfluenceFunction(CASE.model(), Examples(CASE.train), three(), loss_fn=CASE.loss)
    fit = EKFAC.fit

    def interrupted(self, data):
        if data.checkpoint == 2:
            raise KeyboardInterrupt
        return fit(self, data)

    monkeypatch.setattr(EKFAC, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ekfac.influence(CASE.test, show_progress=True)
    monkeypatch.undo()
    capsys.readouterr()
    ekfac.influence(CASE.test, show_progress=True)
    assert "fit the curvature. Processing checkpoint 3/3" in bars(capsys)[0]
