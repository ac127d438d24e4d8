"""What is kept is of the weights, the data and the model that there are; oracle: a fresh object."""

import copy
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, Case, Examples, TanhMLP
from contract import METHODS, assert_close, build, stores
from torch import nn
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
)
from turns import in_turn

from influence_kit import (
    DVEmb,
    EKFACInfluenceFunction,
    ExactNearestNeighbors,
    ExplicitInfluenceFunction,
    GradCos,
    GradDot,
    KMostInfluentialResults,
    LoGra,
    RepresenterPointSelection,
    TracInCP,
    TracInCPFast,
    TracInCPFastRandProj,
    TracInCPRandProj,
)
from influence_kit.errors import ChangedError, InvalidArgumentError
from influence_kit.methods.data_fingerprint import data_fingerprint, what_changed
from influence_kit.methods.function_fingerprint import function_fingerprint

MLP = CASES["mlp"]
KEEPS_NOTHING = {
    "TracInCP",
    "GradDot",
    "GradCos",
    "TracInCPFast",
    "KNNShapley",
    "KNNShapley, of a layer",
    "MAGIC",
}
# checkpoints here are weights alone; the caches of others are those of GradCos, EK-FAC and LoGra
OF_WEIGHTS = [name for name in METHODS if METHODS[name].checkpoints is Case.checkpoints]
OTHER_WEIGHTS = "checkpoint 0 holds other weights than when .*; call `(fit|forget)"
OTHER_DATA = "`(train|hessian)_dataset` is not what it was .* when .*; call `(fit|forget)"
OTHER_MODEL = "the model is not what it was .* when .*; call `(fit|forget)"


def answers(method: Any, test: Any = MLP.test) -> Iterator[tuple[str, Callable[[], Any]]]:
    """All that a method can be asked."""
    calls: dict[str, Callable[[], Any]] = {
        "influence": lambda: method.influence(test, k=None),
        "aggregate": lambda: method.influence(test, k=None, aggregate=True),
        "k": lambda: method.influence(test, k=2),
        "self_influence": lambda: method.self_influence(),
    }
    for name in ("influence_by_layer", "compute_intermediate_quantities", "refitted_outputs"):
        if hasattr(method, name):
            calls[name] = lambda name=name: getattr(method, name)(test)
    for name in ("representer_values", "embeddings"):
        if hasattr(method, name):
            calls[name] = lambda name=name: getattr(method, name)()
    for name in ("R", "src_intermediate_quantities"):
        if hasattr(type(method), name):
            calls[name] = lambda name=name: getattr(method, name)
    if hasattr(method, "perturbation_influence") and method.relative is None:
        calls["perturbation_influence"] = lambda: method.perturbation_influence(test)
    return iter(calls.items())


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, KMostInfluentialResults):
        assert torch.equal(found.indices, expected.indices)
        found, expected = found.influence_scores, expected.influence_scores
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        found, expected = torch.stack(list(found.values())), torch.stack(list(expected.values()))
    assert_close(found, expected, 1e-7)


def compare(old: Any, fresh: Any, match: str, must: bool, test: Any = MLP.test) -> None:
    """Each answer is an error, if it must be one, and else that of the fresh object."""
    expected = dict(answers(fresh, test))
    for name, ask in answers(old, test):
        try:
            right = expected[name]()
        except NotImplementedError:
            continue
        if must:
            with pytest.raises(InvalidArgumentError, match=match):
                ask()
        else:
            assert_same(ask(), right)


def ask_all(method: Any, test: Any = MLP.test) -> None:
    for _, ask in answers(method, test):
        with suppress(NotImplementedError):
            ask()


def keeps(method: str) -> bool:
    return method not in KEEPS_NOTHING


def train_on(model: nn.Module) -> None:
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.mul_(1.3).add_(0.1 * (number + 1))


# Weights.


@pytest.mark.parametrize("method", OF_WEIGHTS)
def test_weights_that_are_trained_on_between_two_calls(method: str) -> None:
    model = MLP.model()
    kept = build(method, MLP, model=model, checkpoints=[model.state_dict()])
    ask_all(kept)
    train_on(model)
    states = [copy.deepcopy(model.state_dict())]
    fresh = build(method, MLP, model=copy.deepcopy(model), checkpoints=states)
    # the embeddings are of the trace, and only the test gradients of the checkpoint
    compare(kept, fresh, OTHER_WEIGHTS, keeps(method) and method != "DVEmb")
    kept.forget()
    compare(kept, fresh, "", False)


@pytest.mark.parametrize("method", ["TracInCPRandProj", "TracInCPFastRandProj", "LoGra", "TRAK"])
def test_a_checkpoint_file_that_is_written_again(method: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint-1.pt"
    torch.save(MLP.states[0], path)
    kept = build(method, MLP, checkpoints=[str(path)])
    kept.influence(MLP.test)
    torch.save(MLP.states[1], path)
    with pytest.raises(InvalidArgumentError, match=OTHER_WEIGHTS):
        kept.influence(MLP.test)
    torch.save(MLP.states[0], path)
    fresh = build(method, MLP, checkpoints=[MLP.states[0]])
    assert_same(kept.influence(MLP.test), fresh.influence(MLP.test))


@pytest.mark.parametrize("method", [name for name in OF_WEIGHTS if stores(name)])
def test_a_store_of_other_weights(method: str, tmp_path: Path) -> None:
    model = MLP.model()
    arguments = {"model": model, "checkpoints": [model.state_dict()]}
    stored = build(method, MLP, store=tmp_path, **arguments)
    stored.influence(MLP.test)
    train_on(model)
    with pytest.raises(InvalidArgumentError, match=OTHER_WEIGHTS):
        stored.influence(MLP.test)
    stored.checkpoints = [model.state_dict()]
    with pytest.raises(InvalidArgumentError, match="weights of the checkpoints"):
        stored.influence(MLP.test)


def test_a_fit_of_the_new_weights_can_be_loaded_in_place_of_the_old(tmp_path: Path) -> None:
    weights = copy.deepcopy(MLP.states[0])
    kept = build("LoGra", MLP, checkpoints=[weights])
    kept.influence(MLP.test)
    fresh = build("LoGra", MLP, checkpoints=[MLP.states[1]])
    fresh.save(tmp_path)
    weights.update(copy.deepcopy(MLP.states[1]))
    with pytest.raises(InvalidArgumentError, match="holds no manifest"):
        kept.load(tmp_path / "none")
    with pytest.raises(InvalidArgumentError, match=OTHER_WEIGHTS):
        kept.influence(MLP.test)
    kept.load(tmp_path)
    compare(kept, fresh, "", False)


def test_where_examples_stand_is_not_tried_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MLP.model()
    kept = build("TracInCPRandProj", MLP, model=model, checkpoints=[model.state_dict()])
    kept.influence(MLP.test)
    train_on(model)
    monkeypatch.setattr(TracInCPRandProj, "read_otherwise", lambda self: True)
    with pytest.raises(ChangedError, match=OTHER_WEIGHTS):
        kept.influence(MLP.test)


def test_an_index_that_serves_two_objects() -> None:
    index, model = ExactNearestNeighbors(), MLP.model()
    own = {"loss_fn": MLP.loss, "nearest_neighbors": index}
    of_all, of_few = (
        TracInCPFastRandProj(model, "head", Examples(data), MLP.checkpoints(), **own)
        for data in (MLP.train, tuple(t[:5] for t in MLP.train))
    )
    expected = of_all.influence(MLP.test, k=3)
    few = of_few.influence(MLP.test, k=3)
    assert_same(of_all.influence(MLP.test, k=3), expected)
    assert_same(of_few.influence(MLP.test, k=3), few)


# Data.


def flipped(data: TensorDataset) -> None:
    data.tensors[1][3] = (data.tensors[1][3] + 1) % 3


def appended(data: TensorDataset) -> None:
    data.tensors = tuple(torch.cat([t, t[:2]]) for t in data.tensors)


# MAGIC refuses changed data, as its run cannot be repeated with them
@in_turn("change, method", [flipped, appended], [m for m in OF_WEIGHTS if m != "MAGIC"])
def test_data_that_are_changed_in_place(method: str, change: Callable[[Any], None]) -> None:
    data, states = TensorDataset(*(t.clone() for t in MLP.train)), MLP.checkpoints()
    trace = {}
    if method == "DVEmb":  # the same steps for both
        step = {**states[0], "lr": 0.1, "epoch": 0, "indices": [0, 3, 4]}
        trace, states = {"trace": [step]}, states[-1:]
    kept = build(method, MLP, data=data, checkpoints=states, **trace)
    ask_all(kept)
    change(data)
    fresh = build(method, MLP, data=data, checkpoints=states, **trace)
    # a curvature of the case's own data is that of the data as they were
    compare(kept, fresh, OTHER_DATA, keeps(method))
    kept.forget()
    compare(kept, fresh, "", False)


def test_hessian_data_that_are_changed_in_place() -> None:
    data = TensorDataset(*(t.clone() for t in MLP.train))
    kept = build("ExplicitInfluenceFunction", MLP, hessian_dataset=data)
    kept.influence(MLP.test)
    flipped(data)
    match = "`hessian_dataset` is not what it was .* when the curvature was measured; call `fit"
    with pytest.raises(InvalidArgumentError, match=match):
        kept.influence(MLP.test)
    fresh = build("ExplicitInfluenceFunction", MLP, hessian_dataset=data)
    assert_same(kept.fit().influence(MLP.test), fresh.influence(MLP.test))


def test_a_trace_that_is_changed_in_place() -> None:
    state = {key: value.clone() for key, value in MLP.states[0].items()}
    trace = [{"state_dict": state, "lr": 0.1, "indices": [0, 1]}]
    model, data = MLP.model(), Examples(MLP.train)
    dvemb = DVEmb(model, data, MLP.states[-1:], trace=trace, loss_fn=MLP.loss)
    dvemb.influence(MLP.test)
    state["head.weight"].mul_(2)
    match = "`trace` is not what it was .* when the training examples were embedded; call `forget"
    for ask in (dvemb.embeddings, lambda: dvemb.influence(MLP.test)):
        with pytest.raises(InvalidArgumentError, match=match):
            ask()


class Arrays(Dataset):
    """A data set with attributes of its own: arrays, a list of labels, a dict, a counter."""

    def __init__(self, n: int = 20, width: int = 3, shift: float = 0.0) -> None:
        generator = np.random.default_rng(0)
        self.x = generator.random((n, width))
        self.labels = [i % 3 for i in range(n)]
        self.more = {"weights": torch.ones(n)}
        self.reads = 0
        self.noise, self.shift = 0.0, shift

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> Any:
        self.reads += 1
        x = torch.tensor(self.x[i]) + self.noise * torch.rand(1, dtype=torch.float64)
        return x + self.shift, self.labels[i]


def change_a_row(data: Any) -> None:
    data.x[7, 1] += 1


def change_a_label(data: Any) -> None:
    data.labels[11] = 7


def change_a_dict(data: Any) -> None:
    data.more["weights"][5] = 3


def change_what_it_gives(data: Any) -> None:
    data.shift = 1.0


def add_a_row(data: Any) -> None:
    data.x = np.concatenate([data.x, data.x[:1]])
    data.labels.append(0)


WRAPPED: dict[str, Callable[[Any], Any]] = {
    "itself": lambda data: data,
    "a loader": lambda data: DataLoader(data, batch_size=4),
    "a subset": lambda data: Subset(data, list(range(len(data)))),
    "of two": lambda data: ConcatDataset([Subset(data, [0, 1, 2, 7, 11]), data]),
}


@pytest.mark.parametrize("wrapped", WRAPPED)
@pytest.mark.parametrize(
    "change", [change_a_row, change_a_label, change_a_dict, change_what_it_gives, add_a_row]
)
def test_changes_that_a_fingerprint_shows(wrapped: str, change: Callable[[Any], None]) -> None:
    own = Arrays()
    data = WRAPPED[wrapped](own)
    before = data_fingerprint(data)
    assert what_changed(before, data_fingerprint(data)) is None
    change(own)
    assert what_changed(before, data_fingerprint(data)) is not None


@pytest.mark.parametrize("long", [False, True])
def test_changes_of_lists(long: bool) -> None:
    """Of lists of more than a few entries the entries are not looked into."""
    count = 1000 if long else 10
    data = [(torch.full((4,), float(i)), torch.tensor(i % 3), {"id": i}) for i in range(count)]
    before = data_fingerprint(data)
    assert what_changed(before, data_fingerprint(data)) is None
    data[3][1].fill_(2)
    assert what_changed(before, data_fingerprint(data)) is not None
    before = data_fingerprint(data)
    data[6] = (data[6][0], torch.tensor(1), data[6][2])
    assert what_changed(before, data_fingerprint(data)) is not None
    before = data_fingerprint(data)
    data.append(data[0])
    match = rf"{count} examples then, {count + 1} now"
    assert what_changed(before, data_fingerprint(data)) == match


def test_changes_of_large_tensors_and_arrays() -> None:
    x, y = torch.zeros(400, 12_000, dtype=torch.float32), torch.zeros(400)
    data = TensorDataset(x, y)
    before = data_fingerprint(data)
    x[3, 5] = 1  # between the rows that are looked at
    assert what_changed(before, data_fingerprint(data)) == "data.tensors[0] has changed"
    before = data_fingerprint(data)
    y.numpy()[3] = 1  # torch does not count it, but it is small
    assert what_changed(before, data_fingerprint(data)) == "data.tensors[1] has changed"
    before = data_fingerprint(data)
    x.numpy()[399] = 1
    assert what_changed(before, data_fingerprint(data)) is not None


def test_data_that_differ_at_each_look_are_no_change() -> None:
    """A random transform is not taken for one; what does not differ is still compared."""
    data = Arrays()
    data.noise = 1.0
    model = nn.Linear(3, 3).double()
    kept = TracInCPRandProj(
        model, data, [model.state_dict()], loss_fn=nn.CrossEntropyLoss(), projection_dim=4
    )
    test = (torch.randn(2, 3).double(), torch.tensor([0, 1]))
    with pytest.warns(UserWarning, match="has other inputs each time it is read"):
        first = kept.influence(test)
    assert torch.equal(kept.influence(test), first)
    change_a_label(data)
    with pytest.raises(InvalidArgumentError, match=OTHER_DATA):
        kept.influence(test)


class Stream(IterableDataset):
    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        return ((row, torch.tensor(i % 3)) for i, row in enumerate(self.rows))


def test_data_without_keys() -> None:
    """A stream, and a loader of ready batches."""
    rows = torch.arange(36.0).reshape(12, 3).double()
    for data in (
        DataLoader(Stream(rows), batch_size=4),
        DataLoader(TensorDataset(rows), batch_size=None),
        [(rows[:4], rows[:4]), (rows[4:], rows[4:])],
    ):
        before = data_fingerprint(data)
        assert what_changed(before, data_fingerprint(data)) is None
        rows[7] += 1
        assert what_changed(before, data_fingerprint(data)) is not None


def test_examples_are_those_that_a_sampler_names() -> None:
    data = {f"image {i}": (torch.tensor([float(i)]), i % 3) for i in range(20)}
    loader = DataLoader(data, batch_size=4, sampler=[f"image {i}" for i in range(5)])
    assert "example image 4[0]" in data_fingerprint(loader)
    own = DataLoader(data, batch_sampler=[["image 3", "image 1"], ["image 2"]])
    assert "example image 1[0]" in data_fingerprint(own)


# The loss.


class Focal(nn.Module):
    """A loss that holds a loss and a tensor that is no buffer."""

    def __init__(self, scale: torch.Tensor) -> None:
        super().__init__()
        self.loss, self.scale = nn.CrossEntropyLoss(reduction="none"), scale

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.loss(outputs, targets) * self.scale[targets]


def weighted(outputs: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(outputs, targets, weight=weight, reduction="none")


def of_global(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return weighted(outputs, targets, WEIGHT)


WEIGHT = torch.ones(3, dtype=torch.float64)
LOSSES: dict[str, Callable[[], Any]] = {
    "module": lambda: nn.CrossEntropyLoss(weight=WEIGHT, reduction="none"),
    "own module": lambda: Focal(WEIGHT),
    "partial": lambda: partial(weighted, weight=WEIGHT),
    "around": lambda: (lambda weight: lambda o, t: weighted(o, t, weight))(WEIGHT),
    "module around": lambda: (lambda loss: lambda o, t: loss(o, t))(Focal(WEIGHT)),
    "default": lambda: lambda o, t, w=WEIGHT: weighted(o, t, w),
    "global": lambda: of_global,
    "method": lambda: Focal(WEIGHT).forward,
}


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("method", ["TracInCPRandProj", "ExplicitInfluenceFunction"])
def test_losses_that_are_changed_in_place(method: str, kind: str) -> None:
    model, loss = MLP.model(), LOSSES[kind]()
    arguments = {"model": model, "checkpoints": [model.state_dict()], "loss_fn": loss}
    try:
        kept = build(method, MLP, **arguments)
        before = kept.influence(MLP.test)
        assert torch.equal(kept.influence(MLP.test), before)
        WEIGHT[1] = 3
        match = r"`loss_fn` is not what it was \(.* has changed\) when"
        with pytest.raises(InvalidArgumentError, match=match):
            kept.influence(MLP.test)
        kept.checkpoints = [model.state_dict()]
        assert_same(kept.influence(MLP.test), build(method, MLP, **arguments).influence(MLP.test))
    finally:
        WEIGHT[1] = 1


def test_settings_of_a_loss_and_what_is_no_change() -> None:
    model = MLP.model()
    loss = nn.CrossEntropyLoss(label_smoothing=0.1)
    before = function_fingerprint(loss, model)
    loss.eval()
    assert what_changed(before, function_fingerprint(loss, model)) is None
    loss.label_smoothing = 0.2
    assert (
        what_changed(before, function_fingerprint(loss, model)) == "it.label_smoothing has changed"
    )
    seen: list[int] = []

    def penalized(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        seen.append(len(targets))
        return loss(outputs, targets) + model.head.weight.norm()

    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

    for function in (penalized, Holds(), model.forward, partial(penalized, model)):
        before = function_fingerprint(function, model)
        train_on(model)
        seen.append(1)
        assert what_changed(before, function_fingerprint(function, model)) is None


# The structure of the model.


def new_head(model: TanhMLP) -> None:
    torch.manual_seed(5)
    model.head = nn.Linear(5, 3).double()


def new_activation(model: TanhMLP) -> None:
    model.body[1] = nn.Sigmoid()


def other_names(model: TanhMLP) -> None:
    model.body = nn.Sequential(*model.body, nn.Linear(5, 5).double())


FEW = ("TracInCP", "TracInCPRandProj", "EKFACInfluenceFunction", "TRAK")
# these look at the layers in their constructor
OF_LAYERS = (*FEW, "TracInCPFast", "RepresenterPointSelection", "KNNShapley, of a layer", "LoGra")


@pytest.mark.parametrize(
    ("method", "asked_before", "change"),
    [
        # a trace has the weights of one structure
        *((method, True, new_head) for method in OF_WEIGHTS if method not in ("DVEmb", "MAGIC")),
        *((method, False, new_head) for method in OF_LAYERS),
        *((method, True, change) for method in FEW for change in (new_activation, other_names)),
    ],
)
def test_a_structure_that_is_changed_after_the_constructor(
    method: str, asked_before: bool, change: Callable[[Any], None]
) -> None:
    states: list[Any] = [None]

    def keep(model: nn.Module, checkpoint: Any) -> float:
        return 0.1  # the weights as they are: those of the old structure would not fit

    model = MLP.model()
    arguments = {"checkpoints": states, "checkpoints_load_func": keep}
    kept = build(method, MLP, model=model, **arguments)
    if asked_before:
        ask_all(kept)
    change(model)
    fresh = build(method, MLP, model=copy.deepcopy(model), **arguments)
    compare(kept, fresh, OTHER_MODEL, keeps(method) and asked_before)
    kept.forget()
    compare(kept, fresh, "", False)


def test_damping_by_block_is_checked_again() -> None:
    model = MLP.model()
    layered = build(
        "ExplicitInfluenceFunction",
        MLP,
        model=model,
        checkpoints=[model.state_dict()],
        blocks="layer",
        damping={"body.0": 0.1, "body.2": 0.2, "head": 0.3},
    )
    model.tail = nn.Linear(3, 3).double()
    with pytest.raises(InvalidArgumentError, match="damping"):
        layered.influence(MLP.test)


def test_a_model_in_another_precision() -> None:
    model = MLP.model()
    states = [copy.deepcopy(model.state_dict())]
    kept = build("TracInCPRandProj", MLP, model=model, checkpoints=states)
    kept.influence(MLP.test)
    model.float()
    test = (MLP.test[0].float(), MLP.test[1])
    with pytest.raises(InvalidArgumentError, match=r"float64 .* and is .*float32"):
        kept.influence(test)


# Load functions that change the structure.


def swaps(model: Any, checkpoint: Any) -> float:
    model.head = nn.Linear(5, 3).double()
    model.load_state_dict(checkpoint["state_dict"])
    return 0.1


def swaps_and_fails(model: Any, checkpoint: Any) -> float:
    swaps(model, checkpoint)
    raise RuntimeError("amid the load")


def adds(model: Any, checkpoint: Any) -> float:
    model.extra = nn.Linear(1, 1)
    return 0.1


def removes(model: Any, checkpoint: Any) -> float:
    model.head.bias = None
    return 0.1


def adds_a_parameter(model: Any, checkpoint: Any) -> float:
    model.head.scale = nn.Parameter(torch.ones(1))
    return 0.1


def adds_a_buffer(model: Any, checkpoint: Any) -> float:
    model.head.register_buffer("mask", torch.ones(1))
    return 0.1


def reshapes(model: Any, checkpoint: Any) -> float:
    model.head.bias = nn.Parameter(torch.ones(1).double())
    return 0.1


def reshapes_data(model: Any, checkpoint: Any) -> float:
    model.head.bias.data = torch.ones(1).double()
    return 0.1


SHAPE = r"it replaced 'head.bias', which is .* by a torch.float64 parameter of shape \[1\]"


@pytest.mark.parametrize(
    ("load", "error", "match"),
    [
        (swaps, InvalidArgumentError, "at checkpoint 0: it replaced the module 'head'. Let it"),
        (swaps_and_fails, RuntimeError, "amid the load"),
        (adds, InvalidArgumentError, "it added the module 'extra'"),
        (removes, InvalidArgumentError, "it removed the parameter 'head.bias'"),
        (adds_a_parameter, InvalidArgumentError, "it added the parameter 'head.scale'"),
        (adds_a_buffer, InvalidArgumentError, "it added the buffer 'head.mask'"),
        (reshapes, InvalidArgumentError, SHAPE),
        (reshapes_data, InvalidArgumentError, SHAPE),
    ],
)
def test_a_load_function_that_changes_the_structure(
    unchanged: Any, load: Any, error: type[Exception], match: str
) -> None:
    model = MLP.model()
    parts = dict(model.named_modules())
    for method in (GradDot, GradCos):
        asked = method(
            model, Examples(MLP.train), MLP.checkpoints(), load, loss_fn=MLP.loss, batch_size=4
        )
        test = MLP.test  # drawn when it is asked for
        with unchanged(model), pytest.raises(error, match=match):
            asked.influence(test)
        assert dict(model.named_modules()) == parts


def assigns(model: nn.Module, checkpoint: Any) -> float:
    model.load_state_dict(checkpoint["state_dict"], assign=True)
    return float(checkpoint["learning_rate"])


def assigns_data(model: nn.Module, checkpoint: Any) -> float:
    for name, parameter in model.named_parameters():
        parameter.data = checkpoint["state_dict"][name]
    for name, buffer in checkpoint["state_dict"].items():
        if name.endswith("scale"):
            model.get_submodule(name.rpartition(".")[0]).scale = buffer
    return float(checkpoint["learning_rate"])


class Scaled(nn.Module):
    """A layer with a buffer that its checkpoints have."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("scale", torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * self.scale


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Scaled()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


@pytest.mark.parametrize("load", [assigns, assigns_data])
def test_the_tensors_of_checkpoints_are_not_written_into(unchanged: Any, load: Any) -> None:
    """A load function puts them into the model as they are; the next load would change them."""
    model = Nested().double()
    checkpoints = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        state = {
            key: torch.randn(value.shape, generator=generator, dtype=torch.float64)
            for key, value in model.state_dict().items()
        }
        checkpoints.append({"state_dict": state, "learning_rate": 0.1})
    before = copy.deepcopy(checkpoints)
    data = Examples(MLP.train)
    arguments = {"loss_fn": MLP.loss, "batch_size": 4}
    asked = TracInCP(model, data, checkpoints, load, **arguments)
    test = MLP.test  # drawn when it is asked for
    with unchanged(model):
        found = asked.influence(test)
    assert_close(found, TracInCP(model, data, before, **arguments).influence(MLP.test))
    for old, new in zip(before, checkpoints, strict=True):
        for key, value in old["state_dict"].items():
            assert torch.equal(value, new["state_dict"][key])


def test_a_last_layer_that_is_not_linear_any_more() -> None:
    model = MLP.model()
    arguments = {"loss_fn": MLP.loss}
    states = [copy.deepcopy(model.state_dict())]
    for cls in (RepresenterPointSelection, TracInCPFast):
        asked = cls(model, "head", Examples(MLP.train), states, **arguments)
        head, model.head = model.head, nn.Sequential(nn.Linear(5, 3)).double()
        with pytest.raises(InvalidArgumentError, match="must be a linear layer"):
            asked.influence(MLP.test)
        with pytest.raises(InvalidArgumentError, match="must be a linear layer"):
            asked.influence(MLP.test)
        model.head = head
        fresh = cls(model, "head", Examples(MLP.train), states, **arguments)
        assert_close(asked.influence(MLP.test), fresh.influence(MLP.test))


def test_logra_keeps_its_rows_while_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    data = Arrays()
    model = nn.Linear(3, 3).double()
    kept = LoGra(model, data, [model.state_dict()], loss_fn=nn.CrossEntropyLoss(), batch_size=5)
    test = (torch.randn(2, 3).double(), torch.tensor([0, 1]))
    first = kept.influence(test)
    reads = data.reads
    assert torch.equal(kept.influence(test), first)
    assert data.reads - reads <= 8  # what the fingerprint looks at


SETTINGS = {"factor": 1.0}


def scaled(outputs: Any, targets: Any) -> torch.Tensor:
    """A loss with a number that is nowhere to be seen in it."""
    return SETTINGS["factor"] * nn.functional.cross_entropy(outputs, targets, reduction="none")


KEEPING: dict[str, Callable[..., Any]] = {
    "RandProj": partial(TracInCPRandProj, projection="identity"),
    "Explicit": partial(ExplicitInfluenceFunction, damping=0.1),
    "LoGra": partial(LoGra, projection_dim=16, damping=0.1),
    "EKFAC": partial(EKFACInfluenceFunction, damping=0.1),
}


@pytest.mark.parametrize("name", KEEPING)
@pytest.mark.parametrize("what", ["outputs", "losses"])
def test_a_model_or_loss_that_computes_something_else(
    name: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(9, 3).double(), torch.arange(9) % 2
    model = nn.Sequential(nn.Linear(3, 4), nn.LeakyReLU(0.1), nn.Linear(4, 2)).double()
    checkpoints = [copy.deepcopy(model.state_dict())]

    def make() -> Any:
        return KEEPING[name](model, TensorDataset(x, y), checkpoints, loss_fn=scaled)

    method = make()
    first = method.influence((x[:4], y[:4]))
    assert_close(method.influence((x[:4], y[:4])), first)
    if what == "outputs":
        monkeypatch.setattr(model[1], "negative_slope", 0.7)
    else:
        monkeypatch.setitem(SETTINGS, "factor", 2.0)
    if not (what == "losses" and name == "EKFAC"):  # labels of a weighted loss are not drawn
        with pytest.raises(ChangedError, match=f"gives other {what} for the same weights"):
            method.influence((x[:4], y[:4]))
        method.forget()
        assert_close(method.influence((x[:4], y[:4])), make().influence((x[:4], y[:4])))
