"""Values against sums over all coalitions, laws of the values, and wrong labels that must be found.

A game is a table of utilities ``[2^n, m]``; coalition S stands in row sum of 2^i over i in S.
"""

import dataclasses
import itertools
import math
import sys

import joblib
import numpy as np
import pytest
import sklearn
import torch
from captum.influence import DataInfluence
from scipy import stats
from sklearn.datasets import load_breast_cancer, load_wine
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from influence_kit.errors import InvalidArgumentError, NonFiniteError
from influence_kit.evaluation import mislabel_auc
from influence_kit.valuation import BetaShapley, DataBanzhaf, DataOOB, TMCShapley, Values
from influence_kit.valuation.refits import Moments

N, M = 6, 3
CLASSES = {
    "shapley": (TMCShapley, {}),
    "beta": (BetaShapley, {"alpha": 4, "beta": 1}),
    "banzhaf": (DataBanzhaf, {}),
}
# what each is told to draw
DRAWN = {TMCShapley: "permutations", BetaShapley: "permutations", DataBanzhaf: "subsets"}


def game(n=N, m=M, seed=0):
    """Utilities that no formula has: normal numbers, with a trend in the size."""
    random = np.random.default_rng(seed)
    sizes = np.array([bin(row).count("1") for row in range(2**n)])
    return random.normal(size=(2**n, m)) + np.sqrt(sizes)[:, None]


def row_of(places):
    return int(sum(2 ** int(i) for i in places))


def players(table):
    """The fit and the score of a game: the model is the row, the inputs choose columns."""

    def score(row, inputs):
        return table[row] if inputs is None else table[row][inputs]

    return row_of, score


def build(cls, table, **arguments):
    """On a game, whose empty coalition has its own utility."""
    n = int(math.log2(len(table)))
    return cls(*players(table), n, **({"empty_utility": table[0]} | arguments))


def by_all_coalitions(table, size_weight):
    """Sum over S without i of size_weight(|S|) / C(n-1, |S|) * (u(S + i) - u(S)): ``[m, n]``."""
    n = int(math.log2(len(table)))
    values = np.zeros((table.shape[1], n))
    for i in range(n):
        others = [j for j in range(n) if j != i]
        for k in range(n):
            for chosen in itertools.combinations(others, k):
                gain = table[row_of([*chosen, i])] - table[row_of(chosen)]
                values[:, i] += size_weight(k, n) / math.comb(n - 1, k) * gain
    return torch.from_numpy(values)


def shapley_weight(k, n):
    return 1 / n


def banzhaf_weight(k, n):
    return math.comb(n - 1, k) / 2 ** (n - 1)


def beta_weight(alpha, beta):
    # k of n - 1 draws with the chance of each from Beta(beta, alpha)
    return lambda k, n: stats.betabinom.pmf(k, n - 1, beta, alpha)


WEIGHTS = {"shapley": shapley_weight, "beta": beta_weight(4, 1), "banzhaf": banzhaf_weight}


def all_permutations(n=N):
    return np.array(list(itertools.permutations(range(n))))


def all_subsets(n=N):
    return np.array(list(np.ndindex(*[2] * n)), dtype=bool)


def everything(name):
    """The argument that leaves nothing to chance."""
    cls, own = CLASSES[name]
    drawn = all_subsets() if cls is DataBanzhaf else all_permutations()
    return cls, own | {DRAWN[cls]: drawn}


# Exact values.


@pytest.mark.parametrize("name", CLASSES)
def test_all_permutations_or_subsets_give_the_exact_values(name):
    cls, own = everything(name)
    found = build(cls, game(), **own).influence()
    torch.testing.assert_close(found, by_all_coalitions(game(), WEIGHTS[name]), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("alpha", "beta"), [(1, 1), (16, 1), (1, 4), (0.5, 2.5)])
def test_beta_shapley_is_exact_for_any_alpha_and_beta(alpha, beta):
    arguments = {"alpha": alpha, "beta": beta, "permutations": all_permutations()}
    found = build(BetaShapley, game(), **arguments).influence()
    exact = by_all_coalitions(game(), beta_weight(alpha, beta))
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-11)


def test_beta_shapley_of_one_and_one_is_the_shapley_value():
    beta = build(BetaShapley, game(), alpha=1, beta=1, permutations=20).values()
    shapley = build(TMCShapley, game(), permutations=20).values()
    torch.testing.assert_close(beta.values, shapley.values, rtol=0, atol=1e-12)
    torch.testing.assert_close(beta.standard_errors, shapley.standard_errors, rtol=0, atol=1e-12)


def test_large_alpha_counts_small_subsets():
    """Of a utility that one example is enough for: 1 of the value at large alpha, 1 / n at 1."""
    orders = np.stack([np.roll(np.arange(10), shift) for shift in range(10)])
    for alpha, expected in ((1, 0.1), (1e9, 1.0)):
        beta = BetaShapley(lambda s: 1.0, lambda model, _: model, 10, orders, alpha=alpha, beta=1)
        np.testing.assert_allclose(beta.influence(), expected, rtol=1e-6)


def test_the_weights_of_many_sizes_sum_to_one():
    fit, score = lambda places: 0.0, lambda model, inputs: model
    weights = BetaShapley(fit, score, 3000, 1, alpha=16, beta=1)._size_weights()
    np.testing.assert_allclose(
        weights, stats.betabinom.pmf(np.arange(3000), 2999, 1, 16), rtol=1e-8, atol=1e-300
    )
    assert weights.sum() == pytest.approx(1, abs=1e-9)


# Estimates.


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_estimates_are_within_four_standard_errors(name, n):
    cls, own = CLASSES[name]
    table = game(n, 4, seed=n)
    found = build(cls, table, **own, **{DRAWN[cls]: 400}, seed=3).values()
    away = (found.values - by_all_coalitions(table, WEIGHTS[name])).abs()
    assert (away <= 4 * found.standard_errors + 1e-12).all()
    assert (found.standard_errors < 1).all()


@pytest.mark.parametrize("name", CLASSES)
def test_standard_errors_are_the_spread_of_estimates_over_seeds(name):
    cls, own = CLASSES[name]
    runs = [build(cls, game(), **own, **{DRAWN[cls]: 40}, seed=s).values() for s in range(100)]
    spread = torch.stack([run.values for run in runs]).std(dim=0)
    told = torch.stack([run.standard_errors for run in runs]).square().mean(dim=0).sqrt()
    # the standard deviation of 100 has a relative error of 7%
    torch.testing.assert_close(spread, told, rtol=0.3, atol=0)


def test_the_standard_error_of_permutations_is_that_of_their_samples():
    """By hand: each permutation gives each example one sample."""
    orders = np.random.default_rng(0).permuted(np.tile(np.arange(N), (7, 1)), axis=1)
    table, samples = game(), np.zeros((7, M, N))
    for p, order in enumerate(orders):
        for k, i in enumerate(order):
            samples[p, :, i] = table[row_of(order[: k + 1])] - table[row_of(order[:k])]
    found = build(TMCShapley, table, permutations=orders).values()
    assert isinstance(found, Values)
    np.testing.assert_allclose(found.values, samples.mean(axis=0), atol=1e-12)
    expected = samples.std(axis=0, ddof=1) / np.sqrt(7)
    np.testing.assert_allclose(found.standard_errors, expected, atol=1e-12)
    assert found.counts.tolist() == [7] * N


def test_banzhaf_is_the_difference_of_means_with_its_standard_error():
    table = game()
    subsets = np.random.default_rng(1).random((30, N)) < 0.5
    utilities = np.stack([table[row_of(np.flatnonzero(row))] for row in subsets])
    found = build(DataBanzhaf, table, subsets=subsets).values()
    for i in range(N):
        inside, outside = utilities[subsets[:, i]], utilities[~subsets[:, i]]
        np.testing.assert_allclose(found.values[:, i], inside.mean(0) - outside.mean(0))
        variance = inside.var(0, ddof=1) / len(inside) + outside.var(0, ddof=1) / len(outside)
        np.testing.assert_allclose(found.standard_errors[:, i], np.sqrt(variance))
        assert found.counts[i] == len(inside)


def test_one_sample_has_no_known_error():
    found = build(TMCShapley, game(), permutations=1).values()
    assert (found.standard_errors == torch.inf).all()
    two = build(DataBanzhaf, game(), subsets=np.array([[True] * N, [False] * N])).values()
    assert (two.standard_errors == torch.inf).all()


def test_moments_do_not_cancel_beside_a_large_mean():
    samples = 1e9 + torch.arange(12, dtype=torch.float64).reshape(6, 2)
    moments = Moments(3, 2)
    for start in (0, 3):
        moments.add(torch.tensor([0, 2, 0]), samples[start : start + 3])
    found = moments.result()
    expected = samples[[0, 2, 3, 5]].std(dim=0) / 2
    torch.testing.assert_close(found.standard_errors[:, 0], expected, rtol=1e-7, atol=0)
    assert found.counts.tolist() == [4, 0, 2]


# Laws.


@pytest.mark.parametrize("seed", range(5))
def test_shapley_values_of_each_permutation_sum_to_what_all_add(seed):
    table = game(8, seed=seed)
    found = build(TMCShapley, table, permutations=1, seed=seed).influence().sum(dim=1)
    torch.testing.assert_close(found, torch.from_numpy(table[-1] - table[0]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["shapley", "banzhaf"])
def test_the_values_of_a_sum_are_its_weights(name):
    """An additive utility: exact with one permutation; with subsets, once all are in."""
    worth = np.random.default_rng(0).normal(size=(N, M))
    cls, own = CLASSES[name][0], {"permutations": 1} if name == "shapley" else everything(name)[1]
    found = cls(lambda places: worth[places].sum(axis=0), lambda model, _: model, N, **own)
    torch.testing.assert_close(found.influence(), torch.from_numpy(worth.T), rtol=0, atol=1e-12)


def test_a_sum_leaves_no_error():
    worth = np.random.default_rng(0).normal(size=(N, M))
    found = TMCShapley(lambda places: worth[places].sum(axis=0), lambda model, _: model, N, 9)
    assert (found.values().standard_errors < 1e-14).all()


def test_knn_shapley_is_the_shapley_value_of_nearest_neighbours():
    knn_shapley = pytest.importorskip("influence_kit.methods.knn_shapley.knn_shapley")
    random = torch.Generator().manual_seed(0)
    x, test_x = torch.randn(N, 2, generator=random), torch.randn(4, 2, generator=random)
    y, test_y = torch.arange(N) % 2, torch.tensor([0, 1, 1, 0])
    distances = torch.cdist(test_x, x)

    def score(places, inputs):
        nearest = distances[:, places].argsort(dim=1)[:, :2]
        return (y[places][nearest] == test_y[:, None]).sum(dim=1) / 2

    model, train = torch.nn.Linear(2, 2), torch.utils.data.TensorDataset(x, y)
    knn = knn_shapley.KNNShapley(model, train, [model.state_dict()], n_neighbors=2)
    shapley = TMCShapley(lambda places: places, score, N, all_permutations())
    torch.testing.assert_close(
        shapley.influence(), knn.influence((test_x, test_y)).double(), rtol=0, atol=1e-6
    )


# Captum's face.


@pytest.mark.parametrize("name", CLASSES)
def test_the_k_best_are_sorted_values(name):
    cls, own = everything(name)
    valuation = build(cls, game(), **own)
    assert isinstance(valuation, DataInfluence)
    scores = valuation.influence()
    assert scores.dtype == torch.float64
    for proponents in (True, False):
        for k in (0, 2, N + 3):
            found = valuation.influence(None, k, proponents)
            best = scores.sort(dim=1, descending=proponents)
            torch.testing.assert_close(found.influence_scores, best.values[:, :k], rtol=0, atol=0)
            assert torch.equal(found.indices, best.indices[:, :k])


@pytest.mark.parametrize("name", CLASSES)
def test_aggregate_is_the_sum_of_the_rows(name):
    cls, own = CLASSES[name]
    valuation = build(cls, game(), **own, **{DRAWN[cls]: 40})
    rows, one = valuation.values(), valuation.values(aggregate=True)
    assert one.values.shape == one.standard_errors.shape == (1, N)
    torch.testing.assert_close(one.values[0], rows.values.sum(dim=0), rtol=0, atol=1e-12)
    torch.testing.assert_close(valuation.influence(aggregate=True), one.values, rtol=0, atol=0)
    # the error of a sum is not the sum of errors: it is that of the game of sums
    summed = build(cls, game().sum(axis=1, keepdims=True), **own, **{DRAWN[cls]: 40}).values()
    torch.testing.assert_close(one.standard_errors, summed.standard_errors, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", CLASSES)
def test_self_influence_is_the_diagonal(name):
    cls, own = everything(name)
    valuation = build(cls, game(N, N), **own)
    assert torch.equal(valuation.self_influence(None), valuation.influence().diagonal())
    with pytest.raises(InvalidArgumentError, match=r"takes the 6 training examples .* 2 scores"):
        build(cls, game(N, N), **own, empty_utility=0.0).self_influence([0, 1])


@pytest.mark.parametrize("name", CLASSES)
def test_inputs_are_handed_to_the_score(name):
    cls, own = everything(name)
    valuation = build(cls, game(), **own, empty_utility=0.25)
    torch.testing.assert_close(
        valuation.influence([2, 0]), valuation.influence()[[2, 0]], rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("name", CLASSES)
def test_a_score_may_be_one_number_of_any_kind(name):
    cls, own = CLASSES[name]
    fit = row_of
    table = game()[:, 0].astype(np.float32)
    kinds = [float, np.float32, lambda v: [float(v)], torch.tensor, lambda v: np.array([v])]
    kinds.append(lambda v: torch.tensor(v, requires_grad=True))
    found = [
        cls(fit, lambda row, _, kind=kind: kind(table[row]), N, **own).influence() for kind in kinds
    ]
    assert found[0].shape == (1, N)
    assert all(torch.equal(found[0], other) for other in found)


def test_a_score_may_be_of_truths():
    shapley = TMCShapley(lambda places: 2 in places, lambda model, _: np.array([model, True]), 4)
    assert shapley.influence().tolist()[0] == [0, 0, 1, 0]


def test_places_ascend():
    seen = []

    def fit(places):
        seen.append(places)
        return float(len(places))

    for cls, own in CLASSES.values():
        cls(fit, lambda model, _: model, 9, **own, **{DRAWN[cls]: 20}).influence()
    DataOOB(fit, lambda model, places: places * model, 9, bags=20).values()
    assert all(places.dtype == np.int64 and (np.diff(places) >= 0).all() for places in seen)
    assert all(len(places) for places in seen)


# What is drawn, and fitted.


@pytest.mark.parametrize("name", CLASSES)
def test_draws_depend_on_the_seed_alone(name):
    cls, own = CLASSES[name]
    few = {DRAWN[cls]: 30}
    one, same, other = (build(cls, game(), **own, **few, seed=s).influence() for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("name", CLASSES)
def test_more_draws_begin_with_the_same(name):
    cls, own = CLASSES[name]
    few, many = (build(cls, game(), **own, **{DRAWN[cls]: count}, seed=5) for count in (20, 30))
    draw = "_held" if cls is DataBanzhaf else "_orders"
    assert np.array_equal(getattr(many, draw)()[:20], getattr(few, draw)())


def test_more_bags_begin_with_the_same():
    few, many = (DataOOB(lambda p: p, lambda m, p: p, 7, bags=b) for b in (20, 30))
    assert not np.array_equal(many._drawn()[0], many._drawn()[1])
    np.testing.assert_array_equal(many.bags, 30)
    # sorted within a bag, drawn in one sequence
    np.testing.assert_array_equal(many._drawn()[:20], few._drawn())


def counted(table):
    fit, score = players(table)
    fits = []

    def counting_fit(places):
        fits.append(tuple(places.tolist()))
        return fit(places)

    return counting_fit, score, fits


def test_equal_subsets_are_fitted_once():
    fit, score, fits = counted(game())
    TMCShapley(fit, score, N, all_permutations()).influence()
    assert len(fits) == len(set(fits)) == 2**N - 1
    fits.clear()
    DataBanzhaf(fit, score, N, np.concatenate([all_subsets()] * 2)).influence()
    assert len(fits) == len(set(fits)) == 2**N - 1


@pytest.mark.parametrize("name", CLASSES)
def test_models_that_are_kept_are_not_fitted_again(name):
    cls, own = CLASSES[name]
    own = own | {DRAWN[cls]: 20}
    fit, score, fits = counted(game())
    kept = cls(fit, score, N, **own, keep_models=True)
    first, count = kept.influence(), len(fits)
    torch.testing.assert_close(kept.influence([1]), first[[1]], rtol=0, atol=1e-12)
    assert len(fits) == count
    again = cls(fit, score, N, **own)
    for _ in range(2):
        assert torch.equal(again.influence(), first)
    assert len(fits) == 3 * count


def test_arguments_do_not_change_later():
    shapley = build(TMCShapley, game())
    with pytest.raises(dataclasses.FrozenInstanceError, match="permutations"):
        shapley.permutations = 7


def test_a_bar_counts_models(capsys):
    build(TMCShapley, game(), permutations=2).influence(show_progress=True)
    shown = capsys.readouterr().err
    assert "Using TMCShapley to fit models" in shown
    assert "11/11" in shown  # all, and the five smaller parts of each of two
    build(TMCShapley, game(), permutations=2).influence()
    assert capsys.readouterr().err == ""


# Truncation.


def saturating(n=8):
    """Utility 1 from three examples on, in two columns of which one is of half the size."""
    table = np.zeros((2**n, 2))
    for row in range(2**n):
        table[row] = min(bin(row).count("1"), 3) / 3 * np.array([1.0, 0.5])
    return table


@pytest.mark.parametrize(("tolerance", "largest"), [(0.0, 8), (1e-9, 3), (0.4, 2), (0.7, 1)])
def test_a_permutation_is_left_once_all_tests_are_near_the_end(tolerance, largest):
    fit, score, fits = counted(saturating())
    shapley = TMCShapley(fit, score, 8, 5, tolerance=tolerance)
    values = shapley.influence()
    whole = tuple(range(8))
    assert max(len(places) for places in set(fits) - {whole}) == min(largest, 7)
    left_out = torch.tensor([1.0, 0.5], dtype=torch.float64) - values.sum(dim=1)
    assert (left_out >= -1e-12).all()
    assert (left_out <= tolerance + 1e-12).all()
    assert left_out[0] == pytest.approx(1 - min(largest, 3) / 3)


def test_truncation_looks_at_each_test_also_when_they_are_summed():
    """The sum of two columns that differ by sign is near the end from the start."""
    table = saturating() @ np.array([[1.0, -1.0], [0.0, 0.0]])
    shapley = build(TMCShapley, table, permutations=5, tolerance=0.1)
    assert (shapley.influence().abs().sum(dim=1) > 0.9).all()
    torch.testing.assert_close(
        shapley.influence(aggregate=True)[0], shapley.influence().sum(dim=0), rtol=0, atol=1e-12
    )


def test_all_permutations_may_be_left_at_once():
    shapley = build(TMCShapley, saturating(), permutations=5, tolerance=2.0)
    assert (shapley.influence() == 0).all()


# Several processes.


def with_jobs(name, n_jobs, **arguments):
    """The results of a small question, and of the same again."""
    arguments = {"n_jobs": n_jobs, "seed": 4} | arguments
    if name == "out of bag":
        fit, score = lambda places: places, lambda model, out: np.sin(out + model.sum())
        valuation = DataOOB(fit, score, N, 12, **arguments)
    else:
        cls, own = CLASSES[name]
        valuation = build(cls, game(), **own, **{DRAWN[cls]: 12}, **arguments)
    return [*valuation.values(), *valuation.values()]


@pytest.mark.parametrize("name", [*CLASSES, "out of bag"])
@pytest.mark.parametrize("keep", [False, True])
def test_any_number_of_jobs_gives_the_same_bits(name, keep):
    one = with_jobs(name, 1, keep_models=keep)
    with joblib.parallel_config(backend="threading"):
        assert all(map(torch.equal, one, with_jobs(name, 3, keep_models=keep)))


@pytest.mark.slow
def test_other_processes_give_the_same_bits():
    for name in ("shapley", "out of bag"):
        one = with_jobs(name, 1)
        assert all(map(torch.equal, one, with_jobs(name, 2)))
        assert all(map(torch.equal, one, with_jobs(name, 2, keep_models=True)))
    # a model that cannot travel, and need not where none is kept
    fit, score = lambda places: (1.0 * place for place in places), lambda model, _: sum(model)
    assert TMCShapley(fit, score, 3, 2, n_jobs=2).influence().tolist() == [[0, 1, 2]]


def test_other_processes_need_joblib(monkeypatch):
    monkeypatch.setitem(sys.modules, "joblib", None)
    build(TMCShapley, game(), permutations=2).influence()
    with pytest.raises(InvalidArgumentError, match=r"pip install 'influence_kit\[parallel\]'"):
        build(TMCShapley, game(), n_jobs=2)


# Data-OOB.


def test_out_of_bag_is_the_mean_over_the_models_that_lack_the_example():
    random = np.random.default_rng(0)
    bags = random.integers(5, size=(20, 4))
    table = random.normal(size=(21, 5))

    def fit(places):
        return int((np.sort(bags, axis=1) == places).all(axis=1).argmax())

    found = DataOOB(fit, lambda bag, out: table[bag, out], 5, bags).values()
    for i in range(5):
        samples = [table[fit(np.sort(bag)), i] for bag in bags if i not in bag]
        assert found.values[0, i] == pytest.approx(np.mean(samples))
        error = np.std(samples, ddof=1) / np.sqrt(len(samples))
        assert found.standard_errors[0, i] == pytest.approx(error)
        assert found.counts[i] == len(samples)


def test_bags_are_of_the_size_asked_for_and_have_no_favourites():
    seen = []
    fit = lambda places: seen.append(places)  # noqa: E731
    score = lambda model, out: np.zeros(len(out))  # noqa: E731
    found = DataOOB(fit, score, 40, 500).values()
    assert {len(bag) for bag in seen} == {40}
    # each of 500 bags lacks an example with probability (1 - 1 / 40)^40 = 0.363
    assert found.counts.double().mean() == pytest.approx(500 * (39 / 40) ** 40, rel=0.03)
    seen.clear()
    DataOOB(fit, score, 40, 9, bag_size=5).values()
    assert {len(bag) for bag in seen} == {5}


def test_a_bag_that_holds_all_judges_none():
    bags = np.array([[0, 1, 2], [0, 0, 0], [1, 1, 2]])
    judged = []

    def score(model, out):
        judged.append(out.tolist())
        return out * 1.0

    assert DataOOB(lambda bag: bag, score, 3, bags).self_influence().tolist() == [0, 1, 2]
    assert judged == [[1, 2], [0]]


def test_out_of_bag_answers_for_no_test_examples():
    valuation = DataOOB(lambda bag: bag, lambda model, out: out, 3)
    assert isinstance(valuation, DataInfluence)
    with pytest.raises(NotImplementedError, match=r"call `self_influence\(\)`"):
        valuation.influence(None, k=3)


# Wrong labels.


def with_wrong_labels(load, n, share=0.2, seed=0):
    """Examples, scaled, some with another class's label; the rest as test examples."""
    x, y = load(return_X_y=True)
    random = np.random.default_rng(seed)
    order = random.permutation(len(x))
    x, y = StandardScaler().fit_transform(x)[order], y[order]
    wrong = np.zeros(n, dtype=bool)
    wrong[random.choice(n, int(share * n), replace=False)] = True
    labels = y[:n].copy()
    labels[wrong] = (labels[wrong] + random.integers(1, y.max() + 1, wrong.sum())) % (y.max() + 1)
    return (x[:n], labels), (x[n:], y[n:]), wrong


@pytest.mark.parametrize(("load", "n"), [(load_breast_cancer, 200), (load_wine, 120)])
def test_out_of_bag_finds_wrong_labels(load, n):
    (x, y), _, wrong = with_wrong_labels(load, n)
    classifier = LogisticRegression(C=0.1, tol=1e-2)
    valuation = DataOOB(
        lambda bag: sklearn.clone(classifier).fit(x[bag], y[bag]),
        lambda model, out: model.predict(x[out]) == y[out],
        n,
        bags=60,
    )
    assert mislabel_auc(-valuation.self_influence(), wrong) > 0.9


def ridge_classifier(x, y):
    """A fit by least squares, and its accuracy: for thousands of subsets, also of one class."""

    def with_one(x):
        return np.c_[x, np.ones(len(x))]

    def fit(places):
        a, b = with_one(x[places]), np.eye(y.max() + 1)[y[places]]
        return np.linalg.solve(a.T @ a + 10 * np.eye(a.shape[1]), a.T @ b)

    def accuracy(weights, inputs):
        return ((with_one(inputs[0]) @ weights).argmax(axis=1) == inputs[1]).mean()

    return fit, accuracy


@pytest.mark.parametrize("load", [load_breast_cancer, load_wine])
@pytest.mark.parametrize(
    ("cls", "arguments"),
    [
        (TMCShapley, {"permutations": 50, "tolerance": 0.02}),
        (BetaShapley, {"permutations": 50, "alpha": 4, "beta": 1}),
        (DataBanzhaf, {"subsets": 1000}),
    ],
    ids=CLASSES,
)
def test_wrong_labels_have_low_values(load, cls, arguments):
    (x, y), test, wrong = with_wrong_labels(load, 40)
    chance = 1 / (y.max() + 1)
    valuation = cls(*ridge_classifier(x, y), 40, empty_utility=chance, **arguments)
    assert mislabel_auc(-valuation.influence(test)[0], wrong) > 0.9


# Mistakes.

FINE = (lambda places: 0.0, lambda model, inputs: model)


@pytest.mark.parametrize(
    ("cls", "count", "arguments", "match"),
    [
        (TMCShapley, 0, {}, "`train_count` must be a positive int; got 0"),
        (TMCShapley, 2.0, {}, "`train_count` must be a positive int; got 2.0"),
        (TMCShapley, 3, {"n_jobs": 0}, "`n_jobs` is 0; it must be a number"),
        (TMCShapley, 3, {"n_jobs": True}, "`n_jobs` is True; it must be a number"),
        (TMCShapley, 3, {"permutations": 0}, "`permutations` must be a positive int; got 0"),
        (TMCShapley, 3, {"permutations": True}, "`permutations` must be a positive int; got True"),
        (TMCShapley, 3, {"permutations": [[0, 1]]}, r"array \[P, 3\]; got shape \[1, 2\]"),
        (TMCShapley, 3, {"permutations": [[0, 1, 2], [0, 1, 1]]}, "row 1 of `permutations`"),
        (
            TMCShapley,
            3,
            {"tolerance": -1},
            "that is not negative; got -1",
        ),
        (TMCShapley, 3, {"tolerance": math.nan}, "`tolerance` must be .*got nan"),
        (BetaShapley, 3, {"alpha": 0, "beta": 1}, "`alpha` must be a positive number; got 0"),
        (
            BetaShapley,
            3,
            {"alpha": 1, "beta": math.inf},
            "`beta` must be a .*got inf",
        ),
        (DataBanzhaf, 3, {"subsets": -1}, "`subsets` must be a positive int; got -1"),
        (DataBanzhaf, 3, {"subsets": [[0, 1, 1]]}, r"got int64 of shape \[1, 3\]"),
        (DataBanzhaf, 2, {"subsets": [[True, False], [True, True]]}, "1 of 2 .*the first: 0.*more"),
        (DataOOB, 3, {"bags": 0}, "`bags` must be a positive int; got 0"),
        (DataOOB, 3, {"bag_size": 0}, "`bag_size` must be a positive int; got 0"),
        (DataOOB, 3, {"bags": [[0, 1]], "bag_size": 2}, "`bag_size` is for bags that are drawn"),
        (DataOOB, 3, {"bags": [[0.5, 1]]}, r"got float64 of shape \[1, 2\]"),
        (DataOOB, 3, {"bags": [[0, 3]]}, "indices from 0 to 3; expected 0 to 2"),
        (DataOOB, 3, {"bags": [[0, 1], [2, 0]]}, "1 of 3 .*the first: 0.*2 bags of 2.*smaller"),
    ],
)
def test_wrong_arguments_are_told(cls, count, arguments, match):
    with pytest.raises(InvalidArgumentError, match=match):
        cls(*FINE, count, **arguments)


@pytest.mark.parametrize(
    ("score", "error", "match"),
    [
        (lambda n, _: "good", InvalidArgumentError, "the score of the model .*got 'good'"),
        (lambda n, _: np.ones((2, 2)), InvalidArgumentError, r"got shape \[2, 2\]"),
        (lambda n, _: [], InvalidArgumentError, r"got shape \[0\]"),
        (lambda n, _: [1.0] * n, InvalidArgumentError, "same number of values .*1 for one and 3"),
        (lambda n, _: [0, math.nan], NonFiniteError, r"fitted on indices \[.*\] is nan at index 1"),
    ],
)
@pytest.mark.parametrize("cls", [TMCShapley, DataBanzhaf])
def test_wrong_scores_are_told(cls, score, error, match):
    with pytest.raises(error, match=match):
        cls(lambda places: min(len(places), 3) if len(places) > 2 else 1, score, 7).influence()


def test_a_long_error_names_few_places():
    with pytest.raises(NonFiniteError, match=r"fitted on indices \[0, 1, 2, 3, 4, \.\.\.\] is inf"):
        TMCShapley(lambda places: math.inf, lambda model, _: model, 7).influence()


def test_wrong_empty_utilities_are_told():
    with pytest.raises(InvalidArgumentError, match=r"`empty_utility` holds 2 numbers; .* gives 1"):
        TMCShapley(*FINE, 3, empty_utility=[0, 1]).influence()
    with pytest.raises(InvalidArgumentError, match=r"`empty_utility` must be a number.*got None"):
        TMCShapley(*FINE, 3, empty_utility=None).influence()


def test_a_score_for_each_place_out_of_bag():
    with pytest.raises(InvalidArgumentError, match="one number per index; it gave 1 for"):
        DataOOB(*FINE, 9).values()


def test_k_is_a_count():
    with pytest.raises(InvalidArgumentError, match="k must not be negative; got -1"):
        build(TMCShapley, game(), permutations=1).influence(k=-1)
