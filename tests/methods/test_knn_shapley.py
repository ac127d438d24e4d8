"""KNN-Shapley is the Shapley value: the sum over all coalitions, written out."""

import itertools
import math
from collections.abc import Callable
from inspect import signature
from typing import Any

import oracles
import pytest
import torch
from cases import CASES, Case, Examples
from contract import assert_close
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from influence_kit import KNNShapley
from influence_kit.errors import InvalidArgumentError, NonFiniteError, UnknownLayerError
from influence_kit.methods.activations import Features
from influence_kit.methods.knn_shapley import knn_points, knn_shapley
from influence_kit.methods.knn_shapley.knn_values import far_to_near, values_of_matches

N, M, D = 8, 5, 3
MLP, DICT = CASES["mlp"], CASES["dict"]
ROUNDING = 1e-12


def examples(n: int, seed: int, real: bool = False) -> tuple[Tensor, Tensor]:
    """Features, and labels that are classes or numbers."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, D, generator=generator, dtype=torch.float64)
    if real:
        return x, torch.randn(n, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (n,), generator=generator)


def built(train: Any, model: nn.Module | None = None, **arguments: Any) -> KNNShapley:
    model = nn.Linear(D, 2).double() if model is None else model
    if isinstance(train, tuple):
        train = TensorDataset(*train)
    return KNNShapley(model, train, [model.state_dict()], **arguments)


def euclid(a: Tensor, b: Tensor) -> float:
    return math.dist(a.tolist(), b.tolist())


def cosine_distance(a: Tensor, b: Tensor) -> float:
    return 1 - float(a @ b / a.norm() / b.norm())


def accuracy(labels: list[float], label: float, k: int) -> float:
    return sum(one == label for one in labels) / k


def squared_error(labels: list[float], label: float, k: int) -> float:
    return -((sum(labels) / k - label) ** 2)


Utility = Callable[[list[float], float, int], float]


def over_coalitions(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    k: int,
    utility: Utility = accuracy,
    distance: Callable[[Tensor, Tensor], float] = euclid,
) -> Tensor:
    """sum_S |S|! (n - |S| - 1)! / n! (u(S + i) - u(S)), ``[m, n]``."""
    rows = []
    for x, y in zip(*test, strict=True):
        far = [distance(x, other) for other in train[0]]
        rows.append(shapley_values(far, train[1].tolist(), float(y), k, utility))
    return torch.tensor(rows, dtype=torch.float64)


def shapley_values(
    far: list[float], labels: list[float], label: float, k: int, utility: Utility
) -> list[float]:
    n, values = len(far), [0.0] * len(far)

    def worth(coalition: tuple[int, ...]) -> float:
        nearest = sorted(coalition, key=lambda i: (far[i], i))[:k]
        return utility([labels[i] for i in nearest], label, k)

    for i in range(n):
        others = [j for j in range(n) if j != i]
        for size in range(n):
            weight = 1 / (n * math.comb(n - 1, size))
            for some in itertools.combinations(others, size):
                values[i] += weight * (worth((*some, i)) - worth(some))
    return values


@pytest.mark.parametrize("utility", [accuracy, squared_error])
@pytest.mark.parametrize("k", [1, 2, 3, 5, N, N + 4])
def test_scores_are_the_sum_over_all_coalitions(k: int, utility: Utility) -> None:
    real = utility is squared_error
    train, test = examples(N, 0, real), examples(M, 1, real)
    knn = built(train, n_neighbors=k, utility=utility.__name__)
    expected = over_coalitions(train, test, k, utility)
    assert_close(knn.influence(test), expected, ROUNDING)
    assert_close(knn.influence(test, aggregate=True), expected.sum(0, keepdim=True), ROUNDING)


@pytest.mark.parametrize("k", [1, 2, 3, 5, N + 4])
def test_equal_distances_are_ranked_by_place(k: int) -> None:
    (x, y), test = examples(N, 2), examples(M, 3)
    # three places with one vector and several labels, and a mirror image
    x[3] = x[6] = x[1]
    x[5] = 2 * test[0][0] - x[2]
    y[1], y[3], y[6] = 0, 1, 0
    test[1][:] = 0
    expected = over_coalitions((x, y), test, k)
    assert_close(built((x, y), n_neighbors=k).influence(test), expected, ROUNDING)


def test_cosine_distance_ranks_by_the_angle() -> None:
    train, test = examples(N, 4), examples(M, 5)
    found = built(train, n_neighbors=3, metric="cosine").influence(test)
    assert_close(found, over_coalitions(train, test, 3, distance=cosine_distance), ROUNDING)
    assert not torch.allclose(found, built(train, n_neighbors=3).influence(test))


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("utility", [accuracy, squared_error])
def test_few_training_examples(n: int, k: int, utility: Utility) -> None:
    (x, y), test = examples(n, 0, True), examples(M, 1, True)
    y, labels = y.round().long(), test[1].round().long()
    found = built((x, y), n_neighbors=k, utility=utility.__name__).influence((test[0], labels))
    expected = over_coalitions((x, y), (test[0], labels), k, utility)
    assert torch.allclose(found, expected, rtol=0, atol=ROUNDING)


def recursion(train: tuple[Tensor, Tensor], x: Tensor, y: Tensor, k: int) -> Tensor:
    """Theorem 1 as the paper writes it, for k < n."""
    n = len(train[1])
    order = sorted(range(n), key=lambda i: (euclid(x, train[0][i]), i))
    values = torch.zeros(n, dtype=torch.float64)
    right = [float(train[1][i] == y) for i in order]
    values[order[-1]] = right[-1] / n
    for i in range(n - 1, 0, -1):  # ranks start at 1
        step = (right[i - 1] - right[i]) / k * min(k, i) / i
        values[order[i - 1]] = values[order[i]] + step
    return values


@pytest.mark.parametrize("k", [1, 5, 40])
def test_scores_are_the_recursion_of_the_paper(k: int) -> None:
    train, test = examples(200, 6), examples(7, 7)
    expected = torch.stack([recursion(train, x, y, k) for x, y in zip(*test, strict=True)])
    assert_close(built(train, n_neighbors=k).influence(test), expected, ROUNDING)


@pytest.mark.parametrize("utility", [accuracy, squared_error])
def test_a_row_sums_to_what_all_examples_are_worth(utility: Utility) -> None:
    real = utility is squared_error
    train, test = examples(60, 8, real), examples(M, 9, real)
    found = built(train, n_neighbors=4, utility=utility.__name__).influence(test)
    for row, (x, y) in enumerate(zip(*test, strict=True)):
        nearest = sorted(range(60), key=lambda i: euclid(x, train[0][i]))[:4]
        worth = utility([float(train[1][i]) for i in nearest], float(y), 4)
        nothing = utility([], float(y), 4)
        assert float(found[row].sum()) == pytest.approx(worth - nothing, abs=ROUNDING)


def test_self_influence_has_the_examples_among_themselves() -> None:
    train, test = examples(N, 10), examples(M, 11)
    knn = built(train, n_neighbors=2)
    assert_close(knn.self_influence(), over_coalitions(train, train, 2).diagonal(), ROUNDING)
    assert_close(knn.self_influence(test), over_coalitions(test, test, 2).diagonal(), ROUNDING)


@pytest.mark.parametrize("case", [MLP, DICT, CASES["cnn"]], ids=["mlp", "dict", "cnn"])
def test_a_layer_gives_the_mean_over_checkpoints(case: Case) -> None:
    model, expected = case.model(), torch.zeros(case.m, N, dtype=torch.float64)
    for state in case.states:
        model.load_state_dict(state)
        (x, y), test = _outputs(model, case.train), _outputs(model, case.test)
        expected += over_coalitions((x[:N], y[:N]), test, 3) / len(case.states)
    data = [Examples(case.train)[i] for i in range(N)]
    knn = KNNShapley(case.model(), data, case.checkpoints(), n_neighbors=3, layer=case.final)
    assert_close(knn.influence(case.test), expected, ROUNDING)


def _outputs(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """What the model returns, whose last layer is ``case.final``, and labels."""
    if isinstance(batch, dict):
        return model(batch["x"])["logits"].detach(), batch["labels"]
    return model(batch[0]).detach(), batch[1]


def test_without_a_layer_no_checkpoint_is_loaded() -> None:
    def load(model: nn.Module, checkpoint: Any) -> float:
        raise AssertionError("loaded")

    def knn(**arguments: Any) -> KNNShapley:
        return KNNShapley(MLP.model(), Examples(MLP.train), [1, 2], load, **arguments)

    assert knn().influence(MLP.test).shape == (MLP.m, MLP.n)
    with pytest.raises(AssertionError, match="loaded"):
        knn(layer="body").influence(MLP.test)


@pytest.mark.parametrize("model", [nn.Linear(D, 2).double(), nn.Identity()])
def test_inputs_need_no_checkpoints(model: nn.Module) -> None:
    train, test = examples(N, 0), examples(M, 1)
    expected = built(train, model, n_neighbors=2).influence(test)
    for knn in (
        KNNShapley(model, TensorDataset(*train), n_neighbors=2),
        KNNShapley(model, TensorDataset(*train), None, n_neighbors=2),
    ):
        assert knn.checkpoints == []
        assert torch.equal(knn.influence(test), expected)
        assert torch.equal(knn.influence(test, k=2).indices, oracles.top_k(expected, 2, True)[0])
        assert knn.self_influence().shape == (N,)


def test_a_layer_needs_checkpoints() -> None:
    data = TensorDataset(*examples(N, 0))
    match = (
        r"`checkpoints` is None: the output of layer '' .* \[model.state_dict\(\)\] is the model"
    )
    with pytest.raises(InvalidArgumentError, match=match):
        KNNShapley(nn.Linear(D, 2).double(), data, layer="")
    knn = KNNShapley(nn.Linear(D, 2).double(), data, [{}], layer="")
    with pytest.raises(InvalidArgumentError, match="`checkpoints` is None"):
        knn.checkpoints = None


def test_the_signature_shows_that_checkpoints_may_be_left_out() -> None:
    parameters = signature(KNNShapley).parameters
    assert list(parameters)[:5] == [
        "model",
        "train_dataset",
        "checkpoints",
        "checkpoints_load_func",
        "layers",
    ]
    assert parameters["checkpoints"].default is None


def test_checkpoints_are_loaded_once_a_call() -> None:
    loaded = []

    def load(model: nn.Module, checkpoint: Any) -> float:
        loaded.append(checkpoint["learning_rate"])
        model.load_state_dict(checkpoint["state_dict"])
        return 1.0

    data = Examples(MLP.train)
    knn = KNNShapley(MLP.model(), data, MLP.checkpoints(), load, layer="body", batch_size=2)
    knn.influence(MLP.test, k=3)
    assert loaded == [checkpoint["learning_rate"] for checkpoint in MLP.checkpoints()]


@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("call", ["rows", "sum", "self"])
def test_blocks_of_test_examples_do_not_matter(
    call: str, k: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, test = examples(30, 12), examples(9, 13)
    knn = built(train)

    def result() -> Tensor:
        if call == "self":
            return knn.self_influence()
        found = knn.influence(test, k=k, aggregate=call == "sum")
        return found if k is None else found.influence_scores

    expected = result()
    for rows in (1, 4):
        size = rows * 30 * knn_shapley.BYTES_PER_PAIR // 4
        monkeypatch.setattr(knn_shapley, "workspace_bytes", lambda device, size=size: size)
        assert_close(result(), expected, ROUNDING)


def test_the_k_best_take_no_matrix_of_all_scores() -> None:
    n, m = 500, 4000
    train, test = examples(n, 14), examples(m, 15)
    knn = built(train, n_neighbors=3)
    kept = []
    blocks = knn._blocks

    def watched(*given: Any) -> Any:
        for rows, block in blocks(*given):
            kept.append(block.numel())
            yield rows, block

    knn._blocks = watched  # type: ignore[method-assign]
    found = knn.influence(test, k=2)
    assert found.indices.shape == (m, 2)
    assert len(kept) > 1
    assert max(kept) < n * m // 2


def test_the_models_precision_and_frozen_or_empty_models() -> None:
    train, test = examples(N, 16), examples(M, 17)
    expected = over_coalitions(train, test, 5)
    frozen = nn.Linear(D, 2).double().requires_grad_(False)
    assert built(train, frozen).influence(test).dtype == torch.float64
    single, asked = (train[0].float(), train[1]), (test[0].float(), test[1])
    for model in (nn.Linear(D, 2), nn.Identity()):
        found = built(single, model).influence(asked)
        assert found.dtype == torch.float32
        assert torch.equal(found, expected.float())
    with_graph = single[0].clone().requires_grad_(), single[1]
    assert not built(with_graph, nn.Linear(D, 2)).influence(with_graph).requires_grad
    half = (train[0].bfloat16(), train[1]), (test[0].bfloat16(), test[1])
    rounded = over_coalitions((half[0][0].float(), train[1]), (half[1][0].float(), test[1]), 5)
    knn = built(half[0], nn.Linear(D, 2).bfloat16())
    assert torch.equal(knn.influence(half[1]), rounded.float())
    assert torch.equal(knn.influence(half[1], k=2).influence_scores.max(), rounded.float().max())


def test_a_rank_without_examples_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = examples(N, 0), examples(M, 1)
    knn = built(train)
    monkeypatch.setattr(knn_shapley, "is_mine", lambda place: False)
    assert knn.influence(test).shape == (0, N)
    assert knn.influence(test, k=2).indices.shape == (0, 2)
    assert knn.self_influence().shape == (0,)
    monkeypatch.setattr(knn_points, "is_mine", lambda batch: False)
    reader = knn_points.Reader(Features(knn.model, None), False, False, torch.device("cpu"))
    points = reader([test], "test")
    assert (points.n, points.features.shape) == (0, (0, D))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ranks_are_those_of_a_stable_sort(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    distances = torch.randint(0, 9, (6, 50), generator=generator).to(dtype).sqrt() * 1e-30
    order = distances.sort(dim=1, stable=True).indices
    assert torch.equal(far_to_near(distances), order.flip(1))


def test_equal_values_are_exactly_equal() -> None:
    """So that the first places win, whatever the rounding."""
    matches = torch.tensor([[1.0, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1]], dtype=torch.float64)
    values = values_of_matches(matches, 3)
    assert [len(values[0, part].unique()) for part in (slice(3), slice(3, 7), slice(7, 11))] == [
        1,
        1,
        1,
    ]


class TwoInputs(nn.Module):
    """Of a model with a batch in the second dimension of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(D, 4).double()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.first(torch.stack([x, y])).sum(0)  # [2, n, 4]


@pytest.mark.parametrize("layer", [None, "first"])
@pytest.mark.parametrize("size", [1, 2, 3, N])
def test_several_inputs_and_layers_with_examples_in_another_dimension(
    layer: str | None, size: int
) -> None:
    (x, y), (other, _) = examples(N, 18), examples(N, 19)
    model = TwoInputs()
    both = torch.cat([x, other], dim=1)
    if layer is not None:
        with torch.no_grad():
            both = torch.cat([model.first(x), model.first(other)], dim=1)
    expected = over_coalitions((both, y), (both[:3], y[:3]), 2)
    data = TensorDataset(x, other, y)
    knn = built(data, model, layer=layer, n_neighbors=2, batch_size=size)
    assert_close(knn.influence((x[:3], other[:3], y[:3])), expected, ROUNDING)


def test_a_dict_with_an_input_of_a_name_of_labels() -> None:
    (x, labels), (y, _) = examples(N, 18), examples(N, 19)
    data = Examples({"labels": labels, "x": x, "y": y})
    found = built(data, TwoInputs()).influence(data.batch)
    assert_close(found, built(TensorDataset(x, y, labels), TwoInputs()).influence((x, y, labels)))


def test_labels_in_a_column_are_labels() -> None:
    (x, y), test = examples(N, 20), examples(M, 21)
    expected = built((x, y)).influence(test)
    assert torch.equal(built((x, y[:, None])).influence((test[0], test[1][:, None])), expected)
    is_one, asked = built((x, y == 1)).influence((test[0], test[1] == 1)), test[1] == 1
    assert torch.equal(is_one[asked], expected[asked])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_neighbors": 0}, "`n_neighbors` must be a positive int; got 0"),
        ({"n_neighbors": True}, "`n_neighbors` must be a positive int; got True"),
        ({"metric": "manhattan"}, "`metric` must be .* got 'manhattan'"),
        ({"utility": "f1"}, "`utility` must be .* got 'f1'"),
        ({"layers": [""]}, "`layers` names parameters, which KNNShapley does not use"),
    ],
)
def test_arguments_that_cannot_be_meant(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        built(examples(N, 0), **arguments)


def test_an_unknown_layer_is_refused() -> None:
    with pytest.raises(UnknownLayerError, match="the model has no layers"):
        built(examples(N, 0), layer="second")


@pytest.mark.parametrize(
    "labels",
    [
        torch.zeros(N, dtype=torch.float64),
        torch.zeros(N, dtype=torch.complex64),
        torch.zeros(N, 2, dtype=torch.int64),
    ],
    ids=["numbers", "complex", "tokens"],
)
def test_labels_that_are_no_integers_are_refused(labels: Tensor) -> None:
    x, _ = examples(N, 0)
    knn = built((x, labels))
    with pytest.raises(InvalidArgumentError, match="must be one integer, or one number"):
        knn.influence((x, labels))


@pytest.mark.parametrize("kind", ["training", "test"])
@pytest.mark.parametrize("layer", ["tokens", "head"])
def test_labels_of_tokens_are_refused_before_the_model_runs(kind: str, layer: str) -> None:
    gpt = CASES["gpt"]
    ids, labels = gpt.train
    own, passes = {"training": labels[:, 0], "test": labels[:, 0]} | {kind: labels}, []

    def load(model: nn.Module, checkpoint: Any) -> float:
        raise AssertionError("loaded")

    model = gpt.model()
    model.register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    data = TensorDataset(ids, own["training"])
    knn = KNNShapley(model, data, gpt.checkpoints(), load, layer=layer, batch_size=4)
    match = rf"labels of {kind} examples are torch.int64 of shape .*\. Give a sequence one label"
    with pytest.raises(InvalidArgumentError, match=match):
        knn.influence((ids, own["test"]))
    # one example to see what it takes in memory, for each way in which the batch may be read
    assert len(passes) <= 2


def test_inputs_without_a_distance_are_refused() -> None:
    ids, labels = torch.arange(2 * N).reshape(N, 2), torch.arange(N) % 2
    model = nn.Sequential(nn.Embedding(2 * N, 2), nn.Flatten(), nn.Linear(4, 2)).double()
    knn = built((ids, labels), model)
    with pytest.raises(
        InvalidArgumentError, match=r"not all floating-point tensors .* name a `lay"
    ):
        knn.influence((ids, labels))
    whole = built((ids, labels), model, layer="0")
    assert whole.influence((ids, labels)).shape == (N, N)
    with pytest.raises(InvalidArgumentError, match=r"layer '0' returns torch.int64"):
        built((ids, labels), nn.Sequential(nn.Identity()), layer="0").influence((ids, labels))


def test_features_of_several_widths_are_refused() -> None:
    x, y = examples(N, 0)
    knn = built((x, y), nn.Identity())
    with pytest.raises(InvalidArgumentError, match="some examples have 3 features, and others 2"):
        knn.influence((x[:, :2], y))


class Odd(nn.Module):
    """Layers that are no features of an example."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.pair, self.unused = nn.Linear(2, 2), nn.LSTM(D, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.pair(x)
        return x[:, :2] + self.positions(torch.ones(N, 2))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("positions", "no dimension counts the examples"),
        ("pair", "layer 'pair' returns a tuple, not one tensor"),
        ("unused", r"the layers \['unused'\] did not run"),
    ],
)
def test_layers_that_are_no_features_are_refused(layer: str, message: str) -> None:
    x, y = torch.zeros(N, D), torch.zeros(N, dtype=torch.int64)
    knn = KNNShapley(Odd(), TensorDataset(x, y), [{}], lambda m, c: 1.0, layer=layer, batch_size=N)
    with pytest.raises(InvalidArgumentError, match=message):
        knn.influence((x, y))


def test_an_empty_loader_is_refused() -> None:
    train = examples(N, 0)
    empty: DataLoader[Any] = DataLoader([], batch_size=2)
    with pytest.raises(InvalidArgumentError, match="there are no test examples"):
        built(train).influence(empty)
    with pytest.raises(InvalidArgumentError, match="there are no training examples"):
        built(empty).self_influence()


def test_features_that_are_not_finite_are_refused() -> None:
    (x, y), test = examples(N, 0), examples(M, 1)
    bad = x.clone()
    bad[5, 1] = math.nan
    with pytest.raises(NonFiniteError, match="a feature of training example 5 is NaN"):
        built((bad, y), batch_size=2).influence(test)
    labels = y.double()
    labels[6] = math.inf
    with pytest.raises(NonFiniteError, match="the label of training example 6 is NaN or inf"):
        built((x, labels), utility="squared_error", batch_size=4).influence(test)
    bad[5] = 0
    with pytest.raises(NonFiniteError, match=r"test example 5 have norm 0, and so no cosine"):
        built((x, y), metric="cosine").influence((bad, y))
    with pytest.raises(NonFiniteError, match="a distance between features overflows in"):
        built((x.sign() * 1.7e308, y)).influence((-x.sign() * 1.7e308, y))


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float32, 1e-30),
        (torch.float32, 1e30),
        (torch.float64, 1e-200),
        (torch.float64, 1e200),
    ],
)
def test_features_whose_squares_vanish_or_overflow(
    metric: str, dtype: torch.dtype, scale: float
) -> None:
    (x, y), (asked, labels) = examples(N, 0), examples(M, 1)

    def scores(factor: float) -> Tensor:
        train = ((x * factor).to(dtype), y)
        knn = built(train, nn.Identity(), metric=metric)
        return knn.influence(((asked * factor).to(dtype), labels))

    assert torch.equal(scores(scale), scores(1.0))
