"""A damping that is far too small is told of, at the first question and nowhere else.

The case where it matters: wide sparse inputs, a layer of far more weights than examples.
"""

import math
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import influence_kit
from influence_kit.errors import DampingWarning
from influence_kit.evaluation import half_subsets, tune_damping
from influence_kit.methods.influence_functions import damping_check, damping_warning
from influence_kit.methods.influence_functions.damping_check import DampingCheck, Figures, figures
from influence_kit.scoring.reducers import AllScores
from influence_kit.scoring.stream import Stream

N, M, WIDTH = 150, 40, 200
GENERATOR = torch.Generator().manual_seed(0)
X = (torch.rand(N + M, WIDTH, generator=GENERATOR) < 0.04).double()
Y = (X @ torch.randn(WIDTH, generator=GENERATOR).double() > 0).long()
TRAIN, TESTS = TensorDataset(X[:N], Y[:N]), (X[N:], Y[N:])
TINY = 1e-9
SAID = "the damping is probably far too small"
LAYERED = ["KFACInfluenceFunction", "EKFACInfluenceFunction", "LoGra", "GraSS", "FactGraSS"]
# at sampled slopes of two classes, the Fisher matrix is exact and a tiny damping does less harm
LABELLED = {"EKFACInfluenceFunction": {"curvature": "empirical_fisher"}}
WHOLE = {
    "ExplicitInfluenceFunction": {"curvature": "empirical_fisher"},
    "NystromInfluenceFunction": {"rank": 40},
    "CGInfluenceFunction": {"max_iter": 60},
}


@cache
def states(count: int = 1) -> list[dict[str, Tensor]]:
    """The weights of a network at the end of a short run, and before."""
    torch.manual_seed(0)
    model, found = new_model(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X[:N]), Y[:N]).backward()
        optimizer.step()
        if step >= 60 - count:
            found.append({k: v.clone() for k, v in model.state_dict().items()})
    return found


def new_model() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Linear(16, 2)).double()


def make(name: str = "EKFACInfluenceFunction", train: Any = TRAIN, **keywords: Any) -> Any:
    keywords = {"checkpoints": states(), "damping": TINY, **keywords}
    keywords = {**(WHOLE | LABELLED).get(name, {}), **keywords}
    kind = getattr(influence_kit, name)
    return kind(new_model(), train, loss_fn=nn.CrossEntropyLoss(), **keywords)


def told(method: Any, *args: Any, **keywords: Any) -> list[str]:
    """What a question warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DampingWarning)
        method.influence(*(args or (TESTS,)), **keywords)
    return [str(one.message) for one in caught if one.category is DampingWarning]


# The figures.


def by_loops(scores: np.ndarray, plain: np.ndarray) -> list[tuple[float, float, bool]]:
    found = []
    for ours, theirs in zip(scores, plain, strict=True):
        few = max(1, len(ours) // 16)
        order, own = np.argsort(-ours), np.argsort(-theirs)
        wide = theirs[own[:few]].mean() - theirs[own[-few:]].mean()
        spread = (theirs[order[:few]].mean() - theirs[order[-few:]].mean()) / wide
        found.append((np.corrcoef(ours, theirs)[0, 1], spread, theirs[order[0]] < 0))
    return found


@pytest.mark.parametrize("sampled", [20, 33, 100])
def test_figures_are_those_of_plain_loops(sampled: int) -> None:
    plain = torch.randn(7, sampled, generator=GENERATOR).double()
    scores = 0.3 * plain + torch.randn(7, sampled, generator=GENERATOR).double()
    found = figures(scores, plain)
    assert found is not None
    expected = by_loops(scores.numpy(), plain.numpy())
    assert found.correlations.tolist() == pytest.approx([c for c, _, _ in expected])
    assert found.spreads.tolist() == pytest.approx([s for _, s, _ in expected])
    assert found.opponents == sum(o for _, _, o in expected)
    assert found.sampled == sampled
    scaled = figures(scores * torch.logspace(-8, 8, 7)[:, None].double(), 1e-9 * plain)
    assert scaled is not None
    torch.testing.assert_close(scaled.correlations, found.correlations)


def test_few_or_constant_examples_tell_nothing() -> None:
    plain = torch.randn(8, 40, generator=GENERATOR).double()
    scores = plain.flip(1)
    assert figures(scores[:, :19], plain[:, :19]) is None
    assert figures(scores[:4], plain[:4]) is None
    without = plain.clone()
    without[[1, 5]] = 0.0
    found, rest = figures(scores, without), [0, 2, 3, 4, 6, 7]
    expected = figures(scores[rest], plain[rest])
    assert found is not None
    assert expected is not None
    torch.testing.assert_close(found.correlations, expected.correlations)
    without[rest[:2]] = 3.0
    assert figures(scores, without) is None


def test_both_means_must_be_below_by_two_standard_errors() -> None:
    low, spread = torch.full((9,), 0.1).double(), torch.linspace(0, 0.2, 9).double()
    error = float(spread.std()) / math.sqrt(9)
    assert Figures(low, spread, 0, 40).are_below(0.1 + 2 * error + 1e-6)
    assert not Figures(low, spread, 0, 40).are_below(0.1 + 2 * error - 1e-6)
    assert not Figures(low + 0.5, low, 0, 40).are_below(0.3)
    assert not Figures(low, low + 0.5, 0, 40).are_below(0.3)


# What they are taken of.


def seen_by(method: Any, monkeypatch: pytest.MonkeyPatch, *args: Any, **keywords: Any) -> Figures:
    found: list[Figures] = []
    with monkeypatch.context() as patch:
        watched = lambda total, tell: DampingCheck(total, found.append)  # noqa: E731
        patch.setattr(damping_warning, "DampingCheck", watched)
        method.influence(*(args or (TESTS,)), **keywords)
    (figures,) = found
    return figures


@pytest.mark.parametrize("size", [7, 64, N])
@pytest.mark.parametrize("name", ["EKFACInfluenceFunction", "LoGra", "CGInfluenceFunction"])
def test_they_are_of_examples_from_all_over(
    name: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every second test and training example here, whatever the batches."""
    found = seen_by(make(name, damping="auto", batch_size=size), monkeypatch)
    scores = make(name, damping="auto", batch_size=N).influence(TESTS)
    # far above all eigenvalues scores are plain products of the same gradients
    plain = make(name, damping=1e9, batch_size=N).influence(TESTS)
    expected = figures(scores[::2, ::2], plain[::2, ::2])
    assert expected is not None
    torch.testing.assert_close(found.correlations, expected.correlations, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.spreads, expected.spreads, rtol=1e-4, atol=1e-4)
    assert found.opponents == expected.opponents
    assert (len(found.correlations), found.sampled) == (M // 2, N // 2)


def test_any_question_has_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = seen_by(make(), monkeypatch)
    loader = DataLoader(TensorDataset(*TESTS), batch_size=9)
    both = [*states(2)[::-1]]
    for found in (
        seen_by(make(), monkeypatch, TESTS, k=3),
        seen_by(make(), monkeypatch, TESTS, k=3, proponents=False),
        seen_by(make(), monkeypatch, loader),
        seen_by(make(checkpoints=both), monkeypatch),  # the first is what is looked at
    ):
        torch.testing.assert_close(found.correlations, expected.correlations)
        torch.testing.assert_close(found.spreads, expected.spreads)


def test_of_unknown_length_they_are_of_the_first_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    class Batches:
        def __iter__(self) -> Any:
            return iter(DataLoader(TRAIN, batch_size=50))

    assert seen_by(make(train=Batches()), monkeypatch).sampled == 2 * damping_check.SAMPLED - 1


def test_scores_and_everything_else_are_as_without(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []

    class Counting(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            reads.append(index)
            return super().__getitem__(index)

    found = {}
    for warns in (True, False):
        method = make(train=Counting(*TRAIN.tensors), damping="auto", batch_size=40)
        method._warns_of_damping = warns
        reads.clear()
        torch.manual_seed(3)
        found[warns] = method.influence(TESTS), torch.rand(1), list(reads)
    assert torch.equal(found[True][0], found[False][0])
    assert torch.equal(found[True][1], found[False][1])
    assert found[True][2] == found[False][2]


# When it is said.


@pytest.mark.parametrize("name", [*LAYERED, "ExplicitInfluenceFunction"])
def test_a_tiny_damping_is_told_of(name: str) -> None:
    with pytest.warns(DampingWarning, match=f"^{name}: {SAID}: damping=1e-09"):
        make(name).influence(TESTS)


@pytest.mark.parametrize("name", [*LAYERED, *WHOLE, "DataInf"])
@pytest.mark.filterwarnings("error::influence_kit.errors.DampingWarning")
def test_defaults_are_not(name: str) -> None:
    make(name, damping="auto").influence(TESTS)


def test_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = seen_by(make(), monkeypatch)
    (text,) = told(make())
    mean = float(figures.correlations.mean())
    assert (
        f"over 75 training examples, 20 test examples have a mean correlation of {mean:.2f}" in text
    )
    assert f"for {figures.opponents} of them the highest score" in text
    assert 'Try damping="auto", another rule, or numbers 10 to 1,000 times as large' in text
    assert "tune_damping" in text
    by_block = make(damping={"0": TINY, "2": 2 * TINY})
    assert "damping by block, 1e-09 to 2e-09." in told(by_block)[0]
    monkeypatch.setattr(Figures, "are_below", lambda *_: True)
    usual = make(damping="auto")
    (text,) = told(usual)
    used = usual.damping_used[0]["0"]
    assert f'too small: damping="auto" (rule "evidence"), {used:.3g}. Its' in text
    assert "Try numbers 10 to 1,000 times as large" in text


def test_it_is_said_once_for_each_fit_and_damping() -> None:
    method = make()
    assert len(told(method)) == 1
    assert told(method) == []
    assert told(method, TESTS, k=2) == []
    method.damping = 2 * TINY
    assert len(told(method)) == 1
    method.fit()
    assert len(told(method)) == 1
    method.damping = "auto"
    assert told(method) == []


def test_a_question_that_tells_nothing_leaves_it_to_the_next() -> None:
    method, one = make(), (TESTS[0][:1], TESTS[1][:1])
    assert told(method, one) == []
    assert told(method, TESTS, aggregate=True) == []
    assert told(method, (0 * TESTS[0][:4], TESTS[1][:4])) == []
    assert len(told(method)) == 1


def test_other_questions_tell_nothing() -> None:
    method = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error", DampingWarning)
        method.self_influence()
        quantities = method.compute_intermediate_quantities(TESTS)
        make().influence(quantities)
        few = TensorDataset(X[:19], Y[:19])
        make(train=few).influence(TESTS)
        of_one_class = make(test_output_fn=lambda outputs, _: 0 * outputs.sum(1))
        of_one_class.influence(TESTS)
    with pytest.warns(DampingWarning, match=SAID):
        method.influence_by_layer(TESTS)


@pytest.mark.parametrize("relative", ["l", "theta"])
def test_relative_scores_are_told_of(relative: str) -> None:
    assert len(told(make(relative=relative))) == 1


def test_gradients_from_a_store_are_looked_at(tmp_path: Path, monkeypatch: Any) -> None:
    live = seen_by(make("LoGra"), monkeypatch)
    assert len(told(make("LoGra", store=tmp_path))) == 1
    stored = seen_by(make("LoGra", store=tmp_path), monkeypatch)
    torch.testing.assert_close(stored.correlations, live.correlations)


def test_only_the_first_rank_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(damping_warning, "is_first_rank", lambda: False)
    assert told(make()) == []


def test_of_several_ranks_the_first_takes_more_of_its_share(monkeypatch: Any) -> None:
    monkeypatch.setattr(damping_check, "rank_count", lambda: 2)
    assert DampingCheck(512, print)._every == 4


def test_captums_two_are_silent() -> None:
    keywords: dict[str, Any] = {"loss_fn": nn.CrossEntropyLoss(), "layers": ["2"]}
    naive = influence_kit.NaiveInfluenceFunction(new_model(), TRAIN, states()[0], **keywords)
    assert told(naive) == []


def test_tuning_tries_such_values_in_silence() -> None:
    method, subsets = make(), half_subsets(N, 15)
    truth = -(subsets.double() @ make(damping="auto").influence(TESTS).T)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DampingWarning)
        found = tune_damping(method, [TINY, "auto"], subsets, truth, TESTS, "loss")
    assert found.value == "auto"


def test_a_pass_that_is_not_watched_is_as_before() -> None:
    method = influence_kit.GradDot(new_model(), TRAIN, states(), loss_fn=nn.CrossEntropyLoss())
    with method.session() as loader:
        reducer = AllScores()
        stream = Stream(method.terms(), loader, method._sample)
        stream.scores([TESTS], DataLoader(TRAIN, batch_size=50), reducer, aggregate=False)
    torch.testing.assert_close(reducer.result(), method.influence(TESTS))
