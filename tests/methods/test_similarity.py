"""SimilarityInfluence is Captum's where Captum works, and a plain loop elsewhere."""

import inspect
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import captum.influence
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from captum.influence._core import similarity_influence as captums
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from influence_kit import SimilarityInfluence, cosine_similarity, euclidean_distance
from influence_kit.errors import InvalidArgumentError, NonFiniteError, UnknownLayerError
from influence_kit.methods.row_check import RowCheck
from influence_kit.methods.similarity import saved_activations

N, M = 12, 5
LAYERS = ["conv", "head"]
METRICS = {"cosine": cosine_similarity, "euclidean": euclidean_distance}


class Net(nn.Module):
    """Draws random numbers in training mode; works in place behind its first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu = nn.Conv2d(2, 3, 2), nn.ReLU(inplace=True)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.relu(self.conv(x)).flatten(1)))


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Net().double().eval()


def images(n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, 3, 3, generator=generator, dtype=torch.float64)


SOURCE, TEST = images(N, 1), images(M, 2)


def built(folder: Path, **changed: Any) -> SimilarityInfluence:
    arguments = {"module": net(), "layers": LAYERS, "influence_src_dataset": SOURCE} | changed
    return SimilarityInfluence(activation_dir=folder, **arguments)


def activations(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        conv = module.conv(x)
        return {"conv": conv.flatten(1), "head": module(x)}


def pairwise(test: Tensor, train: Tensor, metric: str) -> Tensor:
    rows = []
    for a in test:
        if metric == "cosine":
            rows.append([float(a @ b / a.norm() / b.norm()) for b in train])
        else:
            rows.append([float((a - b).square().sum().sqrt()) for b in train])
    return torch.tensor(rows, dtype=torch.float64)


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(found) == list(expected)
    for key, value in expected.items():
        if key.startswith("zero_acts"):
            assert torch.equal(found[key], value)
        else:
            assert torch.equal(found[key][0], value[0]), key
            torch.testing.assert_close(found[key][1], value[1], rtol=1e-12, atol=1e-12)


# Metrics.


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 2)])
@pytest.mark.parametrize("metric", METRICS)
def test_metrics_are_those_of_each_pair(metric: str, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    test, train = (
        torch.randn(n, *shape, generator=generator, dtype=torch.float64) for n in (4, 30)
    )
    expected = pairwise(test.reshape(4, -1), train.reshape(30, -1), metric)
    torch.testing.assert_close(METRICS[metric](test, train), expected, rtol=1e-12, atol=1e-12)
    if shape:
        theirs = getattr(captums, METRICS[metric].__name__)(test, train)
        torch.testing.assert_close(METRICS[metric](test, train), theirs)


def test_zero_vectors_have_the_cosine_that_is_asked_for() -> None:
    test, train = torch.tensor([[0.0, 0.0], [1.0, 2.0]]), torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert torch.equal(cosine_similarity(test, train), captums.cosine_similarity(test, train))
    found = cosine_similarity(test, train, replace_nan=-2)
    # Captum's value for the first row is -2 * (0.6 + 0.8), and 8 for the two zeros
    assert torch.equal(found[0], torch.tensor([-2.0, -2.0]))
    assert found[1].tolist() == pytest.approx([11 / 5 / 5**0.5, -2])


def test_equal_vectors_have_no_distance() -> None:
    x = 1e4 + torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    assert euclidean_distance(x, x).diagonal().abs().max() == 0
    half = euclidean_distance(x.bfloat16(), x.bfloat16())
    assert half.dtype == torch.float32


# Captum.


@pytest.mark.parametrize("direction", ["max", "min"])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("size", "top_k"), [(3, 2), (N, 7), (N, N), (4, 1), (6, 0)])
def test_results_are_captums(
    tmp_path: Path, metric: str, direction: str, size: int, top_k: int
) -> None:
    arguments = {"similarity_direction": direction, "batch_size": size}
    name = METRICS[metric].__name__
    theirs = captum.influence.SimilarityInfluence(
        net(), LAYERS, SOURCE, str(tmp_path / "theirs"), "id", getattr(captums, name), **arguments
    )
    ours = SimilarityInfluence(
        net(), LAYERS, SOURCE, str(tmp_path / "ours"), "id", METRICS[metric], **arguments
    )
    assert_equal(ours.influence(TEST, top_k), theirs.influence(TEST, top_k))
    assert isinstance(ours, captum.influence.DataInfluence)
    assert ours.get_name() == theirs.get_name()


@pytest.mark.parametrize("kind", ["tensor", "pairs", "lists", "one-tuples"])
def test_results_are_captums_for_any_examples(tmp_path: Path, kind: str) -> None:
    data: Any = {
        "tensor": SOURCE,
        "pairs": TensorDataset(SOURCE, torch.arange(N)),
        "lists": [[x, 0] for x in SOURCE],
        "one-tuples": TensorDataset(SOURCE),
    }[kind]
    theirs = captum.influence.SimilarityInfluence(net(), LAYERS, data, str(tmp_path / "theirs"))
    ours = SimilarityInfluence(net(), LAYERS, data, str(tmp_path / "ours"))
    assert_equal(ours.influence(TEST), theirs.influence(TEST))


class Two(nn.Module):
    """Two inputs and an option."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()

    def forward(self, x: Tensor, y: Tensor, scale: float = 1.0, shift: Any = None) -> Tensor:
        y = y if shift is None else y + shift
        return self.second(scale * self.first(x) + self.first(y))


def vectors(n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("more", [None, 0.5, (0.5, torch.ones(4, 3, dtype=torch.float64))])
def test_several_inputs_and_arguments_behind_them_are_captums(tmp_path: Path, more: Any) -> None:
    data: Any = [((x, y), 0) for x, y in zip(vectors(N, 4), vectors(N, 5), strict=True)]
    layers, inputs = ["first", "second"], (vectors(4, 6), vectors(4, 7))
    theirs = captum.influence.SimilarityInfluence(Two(), layers, data, str(tmp_path / "theirs"))
    ours = SimilarityInfluence(Two(), layers, data, str(tmp_path / "ours"))
    expected = theirs.influence(inputs, additional_forward_args=more)
    assert_equal(ours.influence(inputs, additional_forward_args=more), expected)
    assert_equal(ours.influence(list(inputs), 1, more), expected)


def test_dicts_are_tuples(tmp_path: Path) -> None:
    x, y = vectors(N, 4), vectors(N, 5)
    pairs: Any = [((x[i], y[i]), 0) for i in range(N)]
    dicts: Any = [{"x": x[i], "y": y[i], "label": 0} for i in range(N)]
    expected = SimilarityInfluence(Two(), ["first", "second"], pairs, tmp_path / "a")
    found = SimilarityInfluence(Two(), ["first", "second"], dicts, tmp_path / "b", batch_size=5)
    inputs = vectors(4, 6), vectors(4, 7)
    assert_equal(
        found.influence({"x": inputs[0], "y": inputs[1]}, 3), expected.influence(inputs, 3)
    )


class OneHot(nn.Module):
    """Features whose Captum cosine with a zero vector is ``replace_nan``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.same, self.more = nn.Identity(), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.more(self.same(x))


ONE_HOT = torch.tensor([[0.0, 3.0], [0.0, 0.0], [2.0, 0.0], [0.0, 0.0]])


@pytest.mark.parametrize(
    "arguments",
    [{}, {"similarity_direction": "min"}, {"replace_nan": -9}, {"replace_nan": 0.25}],
    ids=["max", "min", "given", "between"],
)
def test_zero_vectors_are_captums(tmp_path: Path, arguments: dict[str, Any]) -> None:
    """With one batch of source examples and a test example of one entry, where Captum works."""
    found = {}
    for cls in (captum.influence.SimilarityInfluence, SimilarityInfluence):
        folder = str(tmp_path / cls.__module__)
        influence = cls(OneHot(), ["same", "more"], ONE_HOT, folder, batch_size=4, **arguments)
        text = "Layer same has zero-vector activations for some inputs.*'zero_acts-same'"
        with pytest.warns(RuntimeWarning, match=text):
            found[cls] = influence.influence(torch.tensor([[5.0, 0.0]]), top_k=4)
    theirs, ours = found.values()
    assert list(ours) == list(theirs)
    assert torch.equal(ours["zero_acts-same"], theirs["zero_acts-same"])
    assert ours["same"][1].tolist() == theirs["same"][1].tolist()


@pytest.mark.parametrize("size", [1, 3, 4])
def test_pairs_with_zero_vectors_are_places_in_the_data(tmp_path: Path, size: int) -> None:
    """Captum's are places in the batch, and its values are others than ``replace_nan``."""
    test = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    similarity = SimilarityInfluence(OneHot(), "same", ONE_HOT, tmp_path, batch_size=size)
    with pytest.warns(RuntimeWarning, match="Layer same"):
        found = similarity.influence(test, top_k=4)
    assert found["zero_acts-same"].tolist() == [[0, 1], [0, 3], [1, 0], [1, 1], [1, 2], [1, 3]]
    assert found["same"][0].tolist() == [[0, 2, 1, 3], [0, 1, 2, 3]]
    assert found["same"][1][1].tolist() == [-2] * 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distances = SimilarityInfluence(
            OneHot(), "same", ONE_HOT, tmp_path, similarity_metric=euclidean_distance
        )
        assert list(distances.influence(test)) == ["same"]


def test_the_face_is_captums() -> None:
    for ours, theirs in (
        (SimilarityInfluence.__init__, captum.influence.SimilarityInfluence.__init__),
        (SimilarityInfluence.influence, captum.influence.SimilarityInfluence.influence),
    ):
        found = inspect.signature(ours).parameters
        expected = inspect.signature(theirs).parameters
        assert [name for name in found if name in expected] == list(expected)
        same = [name for name in expected if name != "similarity_metric"]
        assert [found[name].default for name in same] == [expected[n].default for n in same]


def test_attributes_are_captums(tmp_path: Path) -> None:
    ours = built(tmp_path, layers="conv", model_id="one", batch_size=5)
    assert (ours.layers, ours.model_id, ours.batch_size) == (["conv"], "one", 5)
    assert (ours.activation_dir, ours.similarity_direction) == (tmp_path, "max")
    assert ours.replace_nan == -2
    assert isinstance(ours.influence_src_dataloader, DataLoader)
    assert ours.influence_src_dataset is SOURCE


# What Captum leaves broken.


@pytest.mark.parametrize("top_k", [1, 5, N, N + 3])
@pytest.mark.parametrize("direction", ["max", "min"])
@pytest.mark.parametrize("metric", METRICS)
def test_results_are_the_sorted_similarities(
    tmp_path: Path, metric: str, direction: str, top_k: int
) -> None:
    module = net()
    known, asked = activations(module, SOURCE), activations(module, TEST)
    similarity = built(
        tmp_path, similarity_metric=METRICS[metric], similarity_direction=direction, batch_size=5
    )
    found = similarity.influence(TEST, top_k)
    for layer in LAYERS:
        values = pairwise(asked[layer], known[layer], metric)
        expected = values.sort(dim=1, descending=direction == "max")
        assert torch.equal(found[layer][0], expected.indices[:, :top_k])
        torch.testing.assert_close(found[layer][1], expected.values[:, :top_k], rtol=1e-12, atol=0)


@pytest.mark.parametrize("size", [1, 5, 7, N, 100])
@pytest.mark.parametrize("layers", ["conv", ["conv"], ["head", "conv"], ["conv", "conv"]])
def test_batch_size_and_layers_do_not_matter(tmp_path: Path, layers: Any, size: int) -> None:
    expected = built(tmp_path / "a", batch_size=N).influence(TEST, 4)
    found = built(tmp_path / "b", layers=layers, batch_size=size).influence(TEST, 4)
    assert list(found) == ([layers] if isinstance(layers, str) else list(dict.fromkeys(layers)))
    assert_equal(found, {layer: expected[layer] for layer in found})
    loader = DataLoader(SOURCE, batch_size=size)  # type: ignore[arg-type]
    assert_equal(built(tmp_path / "c", influence_src_dataset=loader).influence(TEST, 4), expected)


def test_a_layer_that_runs_again_gives_its_last_output(tmp_path: Path) -> None:
    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.act = nn.Linear(3, 3).double(), nn.Tanh()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.body(self.act(x)))

    module = Again()
    found = SimilarityInfluence(module, "act", vectors(N, 0), tmp_path).influence(vectors(M, 1), N)
    with torch.no_grad():
        values = cosine_similarity(module(vectors(M, 1)), module(vectors(N, 0)))
    torch.testing.assert_close(found["act"][1], values.sort(dim=1, descending=True).values)


class TimeFirst(nn.Module):
    """A layer whose output has its examples in the second dimension, and one without any."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.positions = nn.Linear(3, 2).double(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        self.positions(torch.ones(4, 2))
        return self.inner(torch.stack([x, 2 * x, x**2])).sum(0)


@pytest.mark.parametrize("size", [1, 3, 4])
def test_examples_may_be_in_any_dimension_of_a_layer(tmp_path: Path, size: int) -> None:
    module = TimeFirst()
    found = SimilarityInfluence(module, "inner", vectors(N, 0), tmp_path, batch_size=size)
    with torch.no_grad():
        test, train = (
            module.inner(torch.stack([x, 2 * x, x**2])).movedim(1, 0)
            for x in (vectors(3, 1), vectors(N, 0))
        )
    expected = cosine_similarity(test, train).topk(2)
    assert torch.equal(found.influence(vectors(3, 1), 2)["inner"][0], expected.indices)
    wrong = SimilarityInfluence(module, "positions", vectors(N, 0), tmp_path, batch_size=4)
    with pytest.raises(InvalidArgumentError, match="no dimension counts the examples"):
        wrong.influence(vectors(4, 1))


def test_sequences_of_several_lengths_reach_a_metric_of_the_users(tmp_path: Path) -> None:
    source: Any = [torch.ones(length, 3) * length for length in (2, 2, 5, 3)]
    module = nn.Sequential(nn.Identity())

    def longest(test: Tensor, train: Tensor) -> Tensor:
        return train.amax(dim=(1, 2)).expand(len(test), -1)

    found = SimilarityInfluence(module, "0", source, tmp_path, similarity_metric=longest)
    assert found.influence(torch.ones(2, 1, 3), 3)["0"][0].tolist() == [[2, 3, 0]] * 2


def test_a_metric_of_the_users_gets_batches_of_the_size_asked_for(tmp_path: Path) -> None:
    seen = []

    def dots(test: Tensor, train: Tensor) -> Tensor:
        seen.append((tuple(test.shape), tuple(train.shape)))
        return test.flatten(1) @ train.flatten(1).T

    similarity = built(tmp_path, layers="conv", similarity_metric=dots, batch_size=5)
    found = similarity.influence(TEST, 3)["conv"]
    assert seen == [((M, 3, 2, 2), (n, 3, 2, 2)) for n in (5, 5, 2)]
    module = net()
    known, asked = activations(module, SOURCE)["conv"], activations(module, TEST)["conv"]
    assert torch.equal(found[0], (asked @ known.T).topk(3).indices)


@pytest.mark.parametrize("call", ["first", "again", "error"])
def test_the_users_objects_come_back(
    tmp_path: Path, unchanged: Callable[[nn.Module], Any], call: str
) -> None:
    module = net().train()
    expected = built(tmp_path / "other").influence(TEST)
    similarity = built(tmp_path, module=module)
    if call == "again":
        similarity.influence(TEST)
    with unchanged(module):
        if call == "error":
            with pytest.raises(RuntimeError, match="size"):
                similarity.influence(TEST[:, :1])
        else:
            assert_equal(similarity.influence(TEST), expected)


def test_training_mode_is_left_alone_when_asked(tmp_path: Path) -> None:
    module = net().train()
    seen = []
    module.head.register_forward_hook(lambda m, a, o: seen.append(m.training))
    built(tmp_path, module=module, eval_mode=False).influence(TEST)
    assert all(seen)
    normed = nn.Sequential(nn.BatchNorm2d(2).double())
    wrong = built(tmp_path, module=normed, layers="0", eval_mode=False)
    with pytest.raises(InvalidArgumentError, match="normalizes by the statistics of the batch"):
        wrong.influence(TEST)


# What is saved.


class Pairs(Dataset):
    """Examples with labels."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.x[i], i


def runs(module: nn.Module) -> list[int]:
    """On how many examples a module runs, call by call."""
    seen: list[int] = []
    module.register_forward_pre_hook(lambda m, args: seen.append(len(args[0])))
    return seen


def test_activations_are_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # without the examples that are run again for it
    monkeypatch.setattr(RowCheck, "_agree", lambda *given: True)
    expected = built(tmp_path, model_id="a").influence(TEST, 3)
    module = net()
    seen = runs(module)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # labels may change
        again = built(
            tmp_path,
            module=module,
            model_id="a",
            influence_src_dataset=Pairs(SOURCE),
            batch_size=7,
        )
        assert_equal(again.influence(TEST, 3), expected)
        assert sum(seen) == M + 1
        assert_equal(again.influence(TEST, 3, load_src_from_disk=False), expected)
        assert sum(seen) == 2 * (M + 1) + N
        # of a further layer alone
        seen.clear()
        more = built(tmp_path, module=module, model_id="a", layers=[*LAYERS, "drop"])
        assert list(more.influence(TEST)) == [*LAYERS, "drop"]
        assert sum(seen) == M + 1 + N
    folder = tmp_path / "a" / "src" / "conv"
    assert json.loads((folder / "manifest.json").read_text())["description"]["layer"] == "conv"


def other_weights() -> dict[str, Any]:
    module = net()
    with torch.no_grad():
        module.conv.bias[0] += 1e-9
    return {"module": module}


def other_data() -> dict[str, Any]:
    source = SOURCE.clone()
    source[7, 1, 2, 2] += 1e-9
    return {"influence_src_dataset": source}


def other_class() -> dict[str, Any]:
    module = net()
    module.__class__ = type("Other", (Net,), {})
    return {"module": module}


def other_forward() -> dict[str, Any]:
    module = net()
    module.relu.forward = lambda x: x.abs()
    return {"module": module, "layers": ["head"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_weights, "hash of the weights"),
        (other_data, "hash of the examples"),
        (other_class, "model: .*Net.* there, .*Other.* here"),
        (other_forward, "gave another output for the first example"),
    ],
)
def test_activations_of_something_else_are_computed_anew(
    tmp_path: Path, change: Callable[[], dict[str, Any]], message: str
) -> None:
    built(tmp_path).influence(TEST)
    expected = built(tmp_path / "other", **change()).influence(TEST, 3)
    with pytest.warns(UserWarning, match=f"are computed again, because .*{message}"):
        found = built(tmp_path, **change()).influence(TEST, 3)
    assert_equal(found, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # by now they belong to it
        assert_equal(built(tmp_path, **change()).influence(TEST, 3), expected)


@pytest.mark.parametrize("broken", ["index", "chunk"])
def test_files_that_cannot_be_read(tmp_path: Path, broken: str) -> None:
    expected = built(tmp_path).influence(TEST)
    folder = tmp_path / "src" / "conv"
    (file,) = folder.glob("first-*" if broken == "index" else "outputs-*")
    file.write_bytes(b"no tensors")
    if broken == "index":
        with pytest.warns(UserWarning, match="cannot be read"):
            assert_equal(built(tmp_path).influence(TEST), expected)
    else:
        with pytest.raises(InvalidArgumentError, match="cannot be read"):
            built(tmp_path).influence(TEST)
        assert_equal(built(tmp_path).influence(TEST, load_src_from_disk=False), expected)


def test_an_interrupted_pass_leaves_nothing_that_is_used(tmp_path: Path) -> None:
    expected = built(tmp_path).influence(TEST)
    module, seen = net(), []

    def stop(module: nn.Module, args: Any) -> None:
        seen.append(args)
        if len(seen) == 6:
            raise KeyboardInterrupt

    module.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        built(tmp_path, module=module).influence(TEST, load_src_from_disk=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_equal(built(tmp_path).influence(TEST), expected)


@pytest.mark.parametrize("size", [1, 5])
def test_chunks_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    expected = built(tmp_path / "one").influence(TEST, 4)
    monkeypatch.setattr(saved_activations, "CHUNK_BYTES", 2 * 12 * 8)
    monkeypatch.setattr(
        "influence_kit.methods.similarity.similarity.workspace_bytes", lambda device: 1
    )
    found = built(tmp_path / "many", batch_size=size).influence(TEST, 4)
    assert len(list((tmp_path / "many" / "src" / "conv").glob("outputs-*.safetensors"))) > 2
    assert_equal(found, expected)
    again = built(tmp_path / "many", batch_size=N).influence(TEST, 4)
    assert_equal(again, expected)


def _work(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
    found = built(Path(folder), batch_size=5).influence(TEST, 3)
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_share_what_the_first_one_saves(tmp_path: Path) -> None:
    mp.spawn(_work, args=(2, str(tmp_path)), nprocs=2)
    expected = built(tmp_path / "alone").influence(TEST, 3)
    for rank in range(2):
        assert_equal(torch.load(tmp_path / f"rank{rank}.pt"), expected)


# Errors.


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"similarity_direction": "up"}, ValueError, "up is not a valid value. Must be either"),
        ({"layers": ["conv", "tail"]}, UnknownLayerError, r"no layers \['tail'\]"),
        ({"layers": None}, AssertionError, "should contain str layer names"),
        ({"layers": []}, AssertionError, "`layers` cannot be empty"),
        ({"replace_nam": 2}, TypeError, r"unexpected keyword arguments \['replace_nam'\]"),
        (
            {"replace_nan": 0, "similarity_metric": euclidean_distance},
            InvalidArgumentError,
            "`replace_nan` is an argument of `cosine_similarity`",
        ),
    ],
)
def test_arguments_that_cannot_be_meant(
    tmp_path: Path, arguments: dict[str, Any], error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        built(tmp_path, **arguments)


def test_calls_that_cannot_be_meant(tmp_path: Path) -> None:
    similarity = built(tmp_path)
    with pytest.raises(TypeError, match=r"unexpected keyword arguments \['k'\]; there are top_k"):
        similarity.influence(TEST, k=3)
    for top_k in (-1, 2.0, True, None):
        with pytest.raises(InvalidArgumentError, match="`top_k` must be an int of at least 0"):
            similarity.influence(TEST, top_k=top_k)
    with pytest.raises(InvalidArgumentError, match=r"inputs must be a tensor.*got a str"):
        similarity.influence("image")
    with pytest.raises(InvalidArgumentError, match="`influence_src_dataset` holds no examples"):
        built(tmp_path, influence_src_dataset=SOURCE[:0]).influence(TEST)


def test_a_metric_that_returns_something_else_is_refused(tmp_path: Path) -> None:
    for metric, message in (
        (
            lambda test, train: test.flatten(1)[:, :1],
            r"has shape \(5, 1\).*\n.*should be \(5, 12\)",
        ),
        (lambda test, train: 1.0, "does not meet required dimensions"),
    ):
        similarity = built(tmp_path, similarity_metric=metric, batch_size=N)
        with pytest.raises(AssertionError, match=message):
            similarity.influence(TEST)
    source = SOURCE.clone()
    source[4] = torch.nan
    similarity = built(tmp_path, influence_src_dataset=source, batch_size=3)
    with (
        pytest.warns(UserWarning, match="are computed again"),
        pytest.raises(NonFiniteError, match="test example 0 and source example 4 at layer 'conv'"),
    ):
        similarity.influence(TEST)


def test_complex_vectors_have_no_distance() -> None:
    x = torch.ones(2, 3, dtype=torch.cfloat)
    for metric in (euclidean_distance, cosine_similarity):
        with pytest.raises(InvalidArgumentError, match=r"activations of torch.complex64 have no"):
            metric(x, x)


@pytest.mark.parametrize("scale", [1e-30, 1e-42, 1e30])
def test_distances_of_very_small_and_very_large_vectors(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 5, generator=generator) * scale for n in (3, 4))
    exact = euclidean_distance(x.double(), y.double())
    assert torch.allclose(euclidean_distance(x, y).double(), exact, 1e-3)
    cosines = cosine_similarity(x.double(), y.double())
    assert torch.allclose(cosine_similarity(x, y).double(), cosines, 1e-4, 1e-5)


def test_batches_without_targets_of_an_iterable_of_ones_own(tmp_path: Any) -> None:
    class Batches:
        def __init__(self, x: Tensor) -> None:
            self.x = x

        def __iter__(self) -> Any:
            return iter([(part,) for part in self.x.split(2)])

    model, x = nn.Sequential(nn.Linear(3, 4)), torch.randn(6, 3)
    given = SimilarityInfluence(model, "0", Batches(x), tmp_path)
    assert given.influence(x, top_k=6)["0"][0][:, 0].tolist() == list(range(6))
