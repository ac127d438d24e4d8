"""Perturbation influence against double autograd, and against the slopes of the scores."""

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import influence_oracles as dense
import oracles
import pytest
import torch
from cases import CASES, CLASSES, Examples, cross_entropy, reduced
from contract import assert_close, assert_same, snapshot
from torch import Tensor, nn
from torch.autograd.functional import hessian
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from influence_kit import (
    ArnoldiInfluenceFunction,
    EKFACInfluenceFunction,
    ExplicitInfluenceFunction,
)
from influence_kit.errors import InvalidArgumentError, NonFiniteError, UnknownLayerError
from influence_kit.methods.influence_functions import perturbation
from influence_kit.scoring.features import MostInfluentialFeatures, most_influential

CLOSE = 1e-8
DAMPING = 0.05
# a case, and the layer whose output is perturbed
PERTURBED = [("mlp", None), ("dict", None), ("cnn", None), ("gpt", "tokens"), ("gpt", "qkv")]
every_case = pytest.mark.parametrize(("name", "layer"), PERTURBED)


def make(name: str = "mlp", cls: type = ExplicitInfluenceFunction, **changed: Any) -> Any:
    case = CASES[name]
    data = changed.pop("data", None) or Examples(case.train)
    checkpoints = changed.pop("checkpoints", None) or case.states[:1]
    model = changed.pop("model", None) or case.model()
    arguments = {
        "loss_fn": case.loss,
        "batch_size": 4,
        "damping": DAMPING,
        "curvature": "empirical_fisher",
    }
    return cls(model, data, checkpoints, **arguments | changed)


# The oracle: one pair at a time.


@contextmanager
def shifted(model: nn.Module, layer: str, shift: Tensor) -> Iterator[None]:
    """What the layer returns plus a shift."""
    module = model.get_submodule(layer)
    handle = module.register_forward_hook(lambda _, args, output: output + shift)
    try:
        yield
    finally:
        handle.remove()


def with_input(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(batch, dict):
        return {**batch, "x": change(batch["x"])}
    return change(batch[0]), *batch[1:]


def output_shape(model: nn.Module, layer: str, example: Any) -> torch.Size:
    shapes: list[torch.Size] = []
    handle = model.get_submodule(layer).register_forward_hook(
        lambda _, args, output: shapes.append(output.shape)
    )
    oracles.forward(model, example)
    handle.remove()
    return shapes[0]


def example_gradient(
    model: nn.Module, example: Any, loss: Any, layer: str | None, shift: Tensor
) -> Tensor:
    """The gradient ``[P]`` of an example's loss, a function of the shift."""
    targets = example if isinstance(example, dict) else example[-1]
    with sdpa_kernel(SDPBackend.MATH):
        if layer is None:
            outputs = oracles.forward(model, with_input(example, lambda x: x + shift))
        else:
            with shifted(model, layer, shift):
                outputs = oracles.forward(model, example)
        total = loss(outputs, targets).sum()
        found = torch.autograd.grad(
            total,
            list(model.parameters()),
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
    return torch.cat([g.flatten() for g in found])


def double_autograd(
    model: nn.Module, train: Any, loss: Any, vectors: Tensor, layer: str | None = None
) -> Tensor:
    """d/dx_j <v_i, gradient of example j>, ``[m, n, *shape]``."""
    columns = []
    for j in range(oracles.count(train)):
        example = oracles.one(train, j)
        x = example["x"] if isinstance(example, dict) else example[0]
        shape = x.shape if layer is None else output_shape(model, layer, example)
        shift = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        gradient = example_gradient(model, example, loss, layer, shift)
        rows = [torch.autograd.grad(v @ gradient, shift, retain_graph=True)[0] for v in vectors]
        columns.append(torch.cat(rows))
    return torch.stack(columns, dim=1)


@cache
def factors(name: str, place: int = 0) -> Tensor:
    """M^-1 h of the case's test examples, by dense matrices."""
    case, model = CASES[name], CASES[name].model()
    model.load_state_dict(case.states[place])
    g = oracles.gradients(model, case.train, case.loss)
    damped = g.T @ g / len(g) + DAMPING * torch.eye(g.shape[1], dtype=g.dtype)
    return torch.linalg.solve(damped, oracles.gradients(model, case.test, case.loss).T).T


@cache
def expected(name: str, layer: str | None = None, place: int = 0) -> Tensor:
    case, model = CASES[name], CASES[name].model()
    model.load_state_dict(case.states[place])
    return double_autograd(model, case.train, case.loss, factors(name, place), layer)


# Values.


@every_case
def test_equals_double_autograd(name: str, layer: str | None) -> None:
    found = make(name).perturbation_influence(CASES[name].test, layer=layer)
    assert found.dtype == torch.float64
    assert found.is_contiguous()
    assert_close(found, expected(name, layer), CLOSE)


def test_checkpoints_count_by_their_mean() -> None:
    case = CASES["mlp"]
    several = torch.stack([expected("mlp", None, place) for place in range(len(case.states))])
    method = make(checkpoints=case.checkpoints())
    found = method.perturbation_influence(case.test)
    assert_close(found, several.mean(0), CLOSE)
    given = method.perturbation_influence(method.compute_intermediate_quantities(case.test))
    assert_close(given, several.mean(0), CLOSE)
    best = method.perturbation_influence(case.test, k=3).influence_scores
    assert_close(best, sorted_by_size(several.mean(0))[1][:, :3], CLOSE)


STEP = 1e-5
METHODS = [
    (ExplicitInfluenceFunction, "mlp", {"curvature": "ggn"}),
    (ExplicitInfluenceFunction, "cnn", {"blocks": "layer"}),
    (EKFACInfluenceFunction, "mlp", {}),
]


@pytest.mark.parametrize(("cls", "name", "own"), METHODS)
def test_is_the_slope_of_the_scores_in_the_inputs(
    cls: type, name: str, own: dict[str, Any]
) -> None:
    case = CASES[name]
    method = make(name, cls, **own)
    test_side = method.compute_intermediate_quantities(case.test)
    found = method.perturbation_influence(case.test)

    def scores(feature: int, by: float) -> Tensor:
        step = torch.zeros(case.train[0][0].numel(), dtype=torch.float64)
        step[feature] = by
        moved = Examples(with_input(case.train, lambda x: x + step.view(x.shape[1:])))
        return make(name, cls, data=moved, **own).influence(test_side)

    # an example's scores depend on its own input alone: all can be moved at once
    for feature in torch.linspace(0, case.train[0][0].numel() - 1, 4).long().tolist():
        slope = (scores(feature, STEP) - scores(feature, -STEP)) / (2 * STEP)
        assert_close(found.flatten(2)[..., feature], slope, CLOSE)


def test_is_the_slope_of_the_scores_in_a_layers_output() -> None:
    case, model = CASES["gpt"], CASES["gpt"].model()
    method = make("gpt", model=model)
    test_side = method.compute_intermediate_quantities(case.test)
    found = method.perturbation_influence(case.test, layer="tokens")
    for position, column in [(0, 1), (3, 2), (4, 0)]:
        step = torch.zeros(found.shape[2:], dtype=torch.float64)
        step[position, column] = STEP
        with shifted(model, "tokens", step):
            up = make("gpt", model=model).influence(test_side)
        with shifted(model, "tokens", -step):
            down = make("gpt", model=model).influence(test_side)
        assert_close(found[:, :, position, column], (up - down) / (2 * STEP), CLOSE)


def test_only_the_chosen_parameters_count() -> None:
    case = CASES["mlp"]
    model = case.model()
    model.load_state_dict(case.states[0])
    index = dense.places(model, ["head.weight", "head.bias"])
    g, h = (oracles.gradients(model, b, case.loss)[:, index] for b in (case.train, case.test))
    damped = g.T @ g / len(g) + DAMPING * torch.eye(len(index), dtype=g.dtype)
    vectors = torch.zeros(len(h), sum(p.numel() for p in model.parameters()), dtype=g.dtype)
    vectors[:, index] = torch.linalg.solve(damped, h.T).T
    oracle = double_autograd(model, case.train, case.loss, vectors)
    by_layers = make(layers=["head"])
    by_blocks = make(blocks={"one": ["head.bias", "head.weight"]})
    for method in (by_layers, by_blocks):
        assert_close(method.perturbation_influence(case.test), oracle, CLOSE)


def test_the_summed_hessian_of_captums_methods() -> None:
    case = CASES["mlp"]
    arguments = {"loss_fn": case.loss, "arnoldi_dim": 8, "hessian_reg": 1.0}
    method = ArnoldiInfluenceFunction(
        case.model(), Examples(case.train), case.states[0], batch_size=11, **arguments
    )
    model = case.model()
    model.load_state_dict(case.states[0])
    h = oracles.gradients(model, case.test, case.loss)
    vectors = h @ method.R @ method.R.T
    oracle = double_autograd(model, case.train, case.loss, vectors)
    assert_close(method.perturbation_influence(case.test), oracle, CLOSE)
    embedded = method.compute_intermediate_quantities(case.test)
    assert_close(method.perturbation_influence(embedded), oracle, CLOSE)


def optimum(x: Tensor, y: Tensor, decay: float) -> nn.Linear:
    """A linear classifier of least mean loss plus weight decay, by Newton's method."""
    model = nn.Linear(4, CLASSES).double()
    point = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=torch.float64)

    def objective(vector: Tensor) -> Tensor:
        outputs = dense.outputs_at(model, vector, (x, y))
        return cross_entropy(outputs, y).mean() + decay / 2 * vector.square().sum()

    for _ in range(8):
        slope = torch.autograd.functional.jacobian(objective, point)
        point = point - torch.linalg.solve(hessian(objective, point), slope)
    nn.utils.vector_to_parameters(point, model.parameters())
    return model


def test_tells_what_training_on_shifted_inputs_does_to_the_test_loss() -> None:
    decay, (x, y), (tests, labels) = 0.05, CASES["mlp"].train, CASES["mlp"].test
    model = optimum(x, y, decay)
    method = make(model=model, checkpoints=[model.state_dict()], curvature="hessian", damping=decay)
    found = method.perturbation_influence((tests, labels))
    torch.manual_seed(0)
    j, delta = 7, 1e-3 * torch.randn(4, dtype=torch.float64)
    losses = []
    for sign in (1, -1):
        moved = x.clone()
        moved[j] += sign * delta
        losses.append(cross_entropy(optimum(moved, y, decay)(tests), labels).detach())
    assert_close(-(found[:, j] @ delta) / len(x), (losses[0] - losses[1]) / 2, 1e-4)


# Which examples, and which features.


@pytest.mark.parametrize(
    "indices", [[3], [7, 2, 5], [10, 0, 10], range(4, 9), torch.tensor([6, 1])], ids=str
)
def test_train_indices(indices: Any) -> None:
    found = make().perturbation_influence(CASES["mlp"].test, train_indices=indices)
    assert_close(found, expected("mlp")[:, list(indices)], CLOSE)


class Stream(IterableDataset):
    """Examples that can only be read in order; notes how many were."""

    def __init__(self, batch: Any) -> None:
        self.batch, self.read = batch, 0

    def __iter__(self) -> Iterator[Any]:
        self.read = 0
        for example in Examples(self.batch):
            self.read += 1
            yield example


def test_a_stream_is_read_no_further_than_needed() -> None:
    data = Stream(CASES["mlp"].train)
    method = make(data=data, batch_size=2, hessian_dataset=Examples(CASES["mlp"].train))
    found = method.perturbation_influence(CASES["mlp"].test, train_indices=[4, 1])
    assert_close(found, expected("mlp")[:, [4, 1]], CLOSE)
    assert data.read < 8
    whole = method.perturbation_influence(CASES["mlp"].test)
    assert_close(whole, expected("mlp"), CLOSE)
    with pytest.raises(InvalidArgumentError, match=r"indices from 1 to 11.*has 11 examples"):
        method.perturbation_influence(CASES["mlp"].test, train_indices=[11, 1])


def sorted_by_size(whole: Tensor) -> tuple[Tensor, Tensor]:
    """Places ``[m, n * size, 1 + d]`` and values of all features, the largest first."""
    flat = whole.flatten(1)
    order = flat.abs().argsort(dim=1, descending=True, stable=True)
    places = torch.cartesian_prod(*(torch.arange(size) for size in whole.shape[1:]))
    return places[order], flat.gather(1, order)


@pytest.mark.parametrize("k", [0, 1, 7, 10_000])
@pytest.mark.parametrize(("name", "layer"), [("mlp", None), ("gpt", "tokens")])
def test_k_features_are_the_largest(name: str, layer: str | None, k: int) -> None:
    method = make(name)
    found = method.perturbation_influence(factors(name), k=k, layer=layer)
    whole = method.perturbation_influence(factors(name), layer=layer)
    places, values = sorted_by_size(whole)
    assert isinstance(found, MostInfluentialFeatures)
    assert found.indices.dtype == torch.int64
    # what an entry is called must be what it is
    m = torch.arange(len(whole))[:, None]
    assert found.influence_scores.shape == values[:, :k].shape
    torch.testing.assert_close(found.influence_scores.abs(), values[:, :k].abs())
    torch.testing.assert_close(whole[(m, *found.indices.unbind(-1))], found.influence_scores)
    if name == "mlp":  # no two are equal
        assert torch.equal(found.indices, places[:, :k])


def test_k_features_of_some_examples() -> None:
    found = make().perturbation_influence(CASES["mlp"].test, [9, 4, 4], k=5)
    places, values = sorted_by_size(expected("mlp")[:, [4, 9]])
    places[..., 0] = torch.tensor([4, 9])[places[..., 0]]
    assert torch.equal(found.indices, places[:, :5])
    assert_close(found.influence_scores, values[:, :5], CLOSE)


def test_of_equal_features_the_first_is_taken() -> None:
    blocks = [
        (torch.tensor([0, 1]), torch.tensor([[[1.0, -2.0], [2.0, 0.0]]])),
        (torch.tensor([2, 5]), torch.tensor([[[2.0, -2.0], [3.0, 0.0]]])),
    ]
    found = most_influential(blocks, 4)
    assert found.indices[0].tolist() == [[5, 0], [0, 1], [1, 0], [2, 0]]
    assert found.influence_scores[0].tolist() == [3.0, -2.0, 2.0, 2.0]


# How it is done does not matter.


@pytest.mark.parametrize(("workspace", "batch_size"), [(1, 3), (3000, 11), (40_000, 1)])
@pytest.mark.parametrize(("name", "layer"), [("mlp", None), ("cnn", None), ("gpt", "tokens")])
def test_chunks_do_not_matter(
    name: str, layer: str | None, workspace: int, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perturbation, "workspace_bytes", lambda device: workspace)
    found = make(name, batch_size=batch_size).perturbation_influence(
        factors(name), layer=layer, train_indices=[8, 2]
    )
    assert_close(found, expected(name, layer)[:, [8, 2]], CLOSE)


def test_more_test_than_training_examples() -> None:
    case = CASES["mlp"]
    torch.manual_seed(5)
    many = case.batch(40)
    model = case.model()
    model.load_state_dict(case.states[0])
    g, h = (oracles.gradients(model, batch, case.loss) for batch in (case.train, many))
    damped = g.T @ g / len(g) + DAMPING * torch.eye(g.shape[1], dtype=g.dtype)
    oracle = double_autograd(model, case.train, case.loss, torch.linalg.solve(damped, h.T).T)
    assert_close(make().perturbation_influence(many), oracle, CLOSE)
    assert_close(
        make().perturbation_influence(DataLoader(Examples(many), batch_size=7)), oracle, CLOSE
    )
    assert make().perturbation_influence(factors("mlp")[:0]).shape == (0, 11, 4)


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_the_reduction_of_the_loss_does_not_matter(reduction: str) -> None:
    method = make(loss_fn=reduced(CASES["mlp"].loss, reduction))
    found = method.perturbation_influence(factors("mlp"), train_indices=[1, 5, 6, 7])
    assert_close(found, expected("mlp")[:, [1, 5, 6, 7]], CLOSE)


def test_single_precision() -> None:
    x, y = CASES["mlp"].train
    method = make(data=Examples((x.float(), y)), model=CASES["mlp"].model().float())
    found = method.perturbation_influence((CASES["mlp"].test[0].float(), CASES["mlp"].test[1]))
    assert found.dtype == torch.float32
    assert_close(found.double(), expected("mlp"), 1e-3)


def test_half_precision_is_refused() -> None:
    (x, y), model = CASES["mlp"].train, CASES["mlp"].model().bfloat16()
    method = make(model=model, data=Examples((x.bfloat16(), y)))
    with pytest.raises(InvalidArgumentError, match=r"bfloat16 are mostly rounding.*model.float"):
        method.perturbation_influence((x.bfloat16(), y))


def test_inside_no_grad() -> None:
    with torch.no_grad():
        found = make().perturbation_influence(CASES["mlp"].test)
    assert_close(found, expected("mlp"), CLOSE)


class CubeByHand(torch.autograd.Function):
    """An operation without forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * delta


class Cube(nn.Module):
    def __init__(self, by_hand: bool) -> None:
        super().__init__()
        self.by_hand = by_hand

    def forward(self, x: Tensor) -> Tensor:
        return CubeByHand.apply(x) if self.by_hand else x**3


def cubic(by_hand: bool) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), Cube(by_hand), nn.Linear(5, CLASSES)).double()


@pytest.mark.parametrize("layer", [None, "0"])
def test_two_reverse_passes_where_there_is_no_forward_mode(layer: str | None) -> None:
    forward, by_hand = cubic(False), cubic(True)
    oracle = make(model=forward, checkpoints=[forward.state_dict()])
    method = make(model=by_hand, checkpoints=[forward.state_dict()])
    with pytest.warns(UserWarning, match="perturbations are computed by two reverse passes"):
        found = method.perturbation_influence(CASES["mlp"].test, layer=layer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        usual = oracle.perturbation_influence(CASES["mlp"].test, layer=layer)
    assert_close(found, usual, 1e-12)


@every_case
def test_both_modes_agree(name: str, layer: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = perturbation.mixed_product
    monkeypatch.setattr(
        perturbation, "mixed_product", lambda *given: usual(*given[:-1], mode="reverse")
    )
    found = make(name).perturbation_influence(factors(name), layer=layer)
    assert_close(found, expected(name, layer), CLOSE)


# Models and batches of other kinds.


class Loader:
    """Batches that are read again and again."""

    def __init__(self, *batches: Any) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


class TimeFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).tanh().cumsum(0).tanh()[-1])


@pytest.mark.parametrize("layer", [None, "body"])
def test_examples_in_the_second_dimension(layer: str | None) -> None:
    torch.manual_seed(0)
    model = TimeFirst().double()
    x, y = torch.randn(5, 11, 3, dtype=torch.float64), torch.arange(11) % CLASSES
    swapped = make(
        model=model,
        data=Loader((x[:, :7], y[:7]), (x[:, 7:], y[7:])),
        checkpoints=[model.state_dict()],
    )
    test = x[:, 3:6], y[3:6]
    vectors = swapped.compute_intermediate_quantities(test)
    # as many rows as steps
    some = [0, 1, 3, 5, 6, 9]
    found = swapped.perturbation_influence(test, train_indices=some, layer=layer)
    for column, j in enumerate(some):
        example = x[:, j : j + 1], y[j : j + 1]
        shape = x[:, :1].shape if layer is None else (5, 1, 4)
        shift = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        gradient = example_gradient(model, example, cross_entropy, layer, shift)
        for row, vector in enumerate(vectors):
            (one,) = torch.autograd.grad(vector @ gradient, shift, retain_graph=True)
            assert_close(found[row, column], one[:, 0], CLOSE)


def test_batch_norm() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(11, 4, dtype=torch.float64), torch.arange(11) % CLASSES
    model = nn.Sequential(
        nn.BatchNorm1d(4), nn.ELU(inplace=True), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES)
    ).double()
    model(2 * x)
    method = make(model=model.train(), data=Examples((x, y)), checkpoints=[model.state_dict()])
    vectors = method.compute_intermediate_quantities((x[:3], y[:3]))
    found = method.perturbation_influence(vectors)
    oracle = double_autograd(model.eval(), (x, y), cross_entropy, vectors)
    assert_close(found, oracle, CLOSE)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(3, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor, kind: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.head((x + self.embed(kind)).tanh())


def squared(outputs: Tensor, targets: Any) -> Tensor:
    labels = targets["labels"] if isinstance(targets, dict) else targets
    return (outputs - labels).square().sum(1)


def test_integers_and_labels_beside_the_input() -> None:
    torch.manual_seed(0)
    model = TwoInputs().double()
    x, labels = torch.randn(2, 11, 4, dtype=torch.float64)
    kind, labels = torch.arange(11) % 3, labels[:, :CLASSES]
    state = [model.state_dict()]
    in_tuple = make(
        model=model, data=Examples((x, kind, labels)), checkpoints=state, loss_fn=squared
    )
    batch = {"kind": kind, "labels": labels, "x": x}
    in_dict = make(model=model, data=Examples(batch), checkpoints=state, loss_fn=squared)
    vectors = in_tuple.compute_intermediate_quantities((x[:3], kind[:3], labels[:3]))
    oracle = double_autograd(model, (x, kind, labels), squared, vectors)
    assert_close(in_tuple.perturbation_influence(vectors), oracle, CLOSE)
    assert_close(in_dict.perturbation_influence(vectors), oracle, CLOSE)


def test_targets_stay_as_they_are() -> None:
    """Of an autoencoder whose target is its input, in a tuple and in a dict alike."""
    torch.manual_seed(0)
    x = torch.randn(11, 3, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 3)).double()
    in_tuple = make(
        model=model, data=Examples((x, x)), checkpoints=[model.state_dict()], loss_fn=squared
    )
    vectors = in_tuple.compute_intermediate_quantities((x[:2], x[:2]))
    oracle = double_autograd(model, (x, x), squared, vectors)
    assert_close(in_tuple.perturbation_influence(vectors), oracle, CLOSE)
    from_loader = make(
        model=model, data=Loader((x, x)), checkpoints=[model.state_dict()], loss_fn=squared
    )
    assert_close(from_loader.perturbation_influence(vectors), oracle, CLOSE)


def sequences() -> Any:
    """A pooling model, and a loader of sequences of 3, of 5 and of 3 steps."""
    torch.manual_seed(0)

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(2, 4), nn.Linear(4, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x).tanh().mean(1))

    batches = [
        (torch.randn(4, steps, 2, dtype=torch.float64), torch.arange(4) % CLASSES)
        for steps in (3, 5, 3)
    ]
    return Pooled().double(), batches


def test_inputs_of_different_shapes() -> None:
    model, batches = sequences()
    method = make(model=model, data=Loader(*batches), checkpoints=[model.state_dict()])
    vectors = method.compute_intermediate_quantities(batches[0])
    with pytest.raises(
        InvalidArgumentError, match=r"shape \[5, 2\] for training example 4 and \[3"
    ):
        method.perturbation_influence(vectors)
    short = method.perturbation_influence(vectors, train_indices=[9, 2])
    assert short.shape == (4, 2, 3, 2)
    long = method.perturbation_influence(vectors, train_indices=[6])
    found = method.perturbation_influence(vectors, train_indices=[9, 6, 2], k=22)
    for row, (indices, values) in enumerate(zip(*found, strict=True)):
        assert values.abs().tolist() == sorted(values.abs().tolist(), reverse=True)
        for (example, step, column), value in zip(indices.tolist(), values, strict=True):
            whole = long[row, 0] if example == 6 else short[row, [9, 2].index(example)]
            torch.testing.assert_close(whole[step, column], value)


# The user's objects, and errors.


@every_case
def test_the_users_objects_come_back_unchanged(
    name: str, layer: str | None, unchanged: Callable[[nn.Module], Any]
) -> None:
    model, test = CASES[name].model(), CASES[name].test
    next(model.parameters()).requires_grad_(False)
    method = make(name, model=model.train())
    kept = copy.deepcopy(test)
    before = snapshot(model)
    with unchanged(model):
        method.perturbation_influence(test, layer=layer)
        method.perturbation_influence(test, k=2, layer=layer)
    assert_same(before, snapshot(model))
    for one, other in zip(Examples(test), Examples(kept), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_the_model_comes_back_unchanged_after_an_error(
    unchanged: Callable[[nn.Module], Any],
) -> None:
    model, test = CASES["gpt"].model(), CASES["gpt"].test
    method = make("gpt", model=model)
    for layer in (None, "positions"):
        with unchanged(model), pytest.raises(InvalidArgumentError):
            method.perturbation_influence(test, layer=layer)


def test_tokens_are_not_perturbed() -> None:
    text = r"the model takes 0 among its inputs \[\(torch.int64,\)\].*layer=\"name of the embedding"
    method = make("gpt")
    with pytest.raises(InvalidArgumentError, match=text):
        method.perturbation_influence(CASES["gpt"].test)
    # before hours go into the curvature
    assert method.damping_used == []


def test_one_of_two_inputs_is_not_guessed() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, CLASSES)

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            return self.head(x + z)

    model, (x, y) = Sum().double(), CASES["mlp"].train
    method = make(model=model, data=Examples((x, x, y)), checkpoints=[model.state_dict()])
    with pytest.raises(InvalidArgumentError, match=r"takes 2 among its inputs .*float64.*layer="):
        method.perturbation_influence((x, x, y))
    assert method.perturbation_influence((x, x, y), layer="head").shape == (11, 11, CLASSES)


def test_a_layer_that_cannot_be_perturbed() -> None:
    method = make("gpt")
    with pytest.raises(UnknownLayerError, match=r"no layers \['wte'\]; it has \['tokens'"):
        method.perturbation_influence(CASES["gpt"].test, layer="wte")
    with pytest.raises(InvalidArgumentError, match=r"\[5, 4\] for 4 examples and \[5, 4\] for one"):
        method.perturbation_influence(CASES["gpt"].test, layer="positions")

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twice, self.unused, self.pair = nn.Linear(4, 4), nn.Linear(4, 4), nn.LSTM(4, 4)
            self.head = nn.Linear(4, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.pair(self.twice(self.twice(x))[None])[0][0])

    model = Odd().double()
    method = make(model=model, checkpoints=[model.state_dict()], layers=["head"])
    for layer, text in [
        (
            "twice",
            r"'twice' must run once.*ran 2 times and returned \[torch.float64, torch.float64",
        ),
        ("unused", r"ran 0 times and returned \[\]"),
        ("pair", r"ran 1 times and returned \[\(torch.float64, \(torch.float64"),
    ]:
        with pytest.raises(InvalidArgumentError, match=text):
            method.perturbation_influence(CASES["mlp"].test, layer=layer)


@pytest.mark.parametrize(
    ("indices", "text"),
    [
        ([11], "indices from 11 to 11; they must be at least 0 and within.*has 11 examples"),
        ([0, -1], "indices from -1 to 0"),
        ([], "one or more indices .*; got \\[\\]"),
        ([0.5], "list of one or more indices.*got \\[0.5\\]"),
        ([True, False], "list of one or more indices"),
        (3, "list of one or more indices.*got 3"),
        ([[1, 2]], "list of one or more indices"),
        ("all", "list of one or more indices.*got 'all'"),
        ([None], "list of one or more indices"),
    ],
    ids=str,
)
def test_wrong_train_indices(indices: Any, text: str) -> None:
    with pytest.raises(InvalidArgumentError, match=text):
        make().perturbation_influence(CASES["mlp"].test, train_indices=indices)


def test_other_wrong_arguments() -> None:
    test = CASES["mlp"].test
    with pytest.raises(TypeError, match="k must be an int"):
        make().perturbation_influence(test, k=2.0)
    with pytest.raises(InvalidArgumentError, match="k must not be negative"):
        make().perturbation_influence(test, k=-1)
    with pytest.raises(InvalidArgumentError, match="`inputs` argument is required"):
        make().perturbation_influence(None)
    with pytest.raises(InvalidArgumentError, match="preconditioned gradients made by"):
        make().perturbation_influence(torch.zeros(2, 3))
    with pytest.raises(NotImplementedError, match=r'relative="l".*depends on the training input'):
        make(relative="l").perturbation_influence(test)


def test_second_derivatives_that_are_not_finite() -> None:
    """|u|^1.5 has a slope and no curvature at 0."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    x, y = torch.ones(3, 1, dtype=torch.float64), torch.tensor([[1.0], [0.0], [2.0]]).double()

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).abs().pow(1.5).sum(1)

    method = make(
        model=model, data=TensorDataset(x, y), checkpoints=[model.state_dict()], loss_fn=loss
    )
    with pytest.raises(NonFiniteError, match="training example 1 on test example 0 is NaN or inf"):
        method.perturbation_influence((x[:1], y[:1]))
    assert math.isfinite(method.perturbation_influence((x[:1], y[:1]), [0, 2]).sum())


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    make().perturbation_influence(CASES["mlp"].test, show_progress=True)
    shown = capsys.readouterr().err
    assert "Using ExplicitInfluenceFunction to compute perturbation influence" in shown
    assert "3/3" in shown


def test_the_oracle_is_the_slope_of_autograds_gradient() -> None:
    case, model = CASES["mlp"], CASES["mlp"].model()
    vectors = torch.eye(5, sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    step = torch.zeros(1, 4, dtype=torch.float64)
    step[0, 2] = STEP
    gradients = [
        oracles.gradients(model, with_input(case.train, lambda x, s=s: x + s * step), case.loss)
        for s in (1, -1)
    ]
    slope = (gradients[0] - gradients[1])[:, :5].T / (2 * STEP)
    assert_close(double_autograd(model, case.train, case.loss, vectors)[..., 2], slope, CLOSE)
