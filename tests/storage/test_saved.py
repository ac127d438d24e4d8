"""What is saved of a curvature: loaded it gives the same scores, or is refused with the reason."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import SHORT, Case, Examples
from contract import METHODS, assert_close, build, plain_scores, scores
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from influence_kit import (
    CGInfluenceFunction,
    EKFACInfluenceFunction,
    ExplicitInfluenceFunction,
    LoGra,
    NystromInfluenceFunction,
)
from influence_kit.curvature import InverseCurvature
from influence_kit.errors import InvalidArgumentError
from influence_kit.methods.influence_functions.fitted_inverse import FittedInverse
from influence_kit.methods.representer.refit import Refit
from influence_kit.storage import manifest as manifest_module
from influence_kit.storage.folders import MANIFEST, TENSORS, hash_of, read_folder, write_folder

CASE = SHORT["mlp"]
FITTED = [name for name in METHODS if hasattr(build(name, CASE), "save")]


def assert_equal(found: Tensor, expected: Tensor) -> None:
    """Up to the order of summation, which depends on how a matrix lies in memory."""
    assert_close(found, expected, 1e-12)


def no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on nothing may be measured."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the curvature was measured again")

    def all_classes(cls: type) -> list[type]:
        return [cls, *(sub for child in cls.__subclasses__() for sub in all_classes(child))]

    monkeypatch.setattr(Refit, "head", refuse)
    for cls in all_classes(InverseCurvature):
        if "fit" in vars(cls):
            monkeypatch.setattr(cls, "fit", refuse)


@pytest.mark.parametrize("method", FITTED)
@pytest.mark.parametrize(("name", "asked"), [("mlp", False), ("gpt", True)])
def test_a_loaded_curvature_gives_the_same_scores(
    method: str,
    name: str,
    asked: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    unchanged: Any,
) -> None:
    case = SHORT[name]
    saved, test = build(method, case), case.test
    expected = scores(saved, test) if asked else plain_scores(method, case)
    with unchanged(saved.model):  # it is fitted now, where it was not asked before
        saved.save(tmp_path / "curvature")
    no_measuring(monkeypatch)
    loaded = build(method, case)
    with unchanged(loaded.model):
        assert loaded.load(tmp_path / "curvature") is loaded
        found = scores(loaded, test)
    assert_equal(found, expected)
    # saved again it is the same
    loaded.save(tmp_path / "again")
    again = build(method, case).load(tmp_path / "again")
    assert_equal(scores(again, test), expected)


@pytest.mark.parametrize(
    "method", ["ExplicitInfluenceFunction", "NystromInfluenceFunction", "EKFACInfluenceFunction"]
)
def test_the_damping_is_not_part_of_what_is_saved(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(method, CASE).save(tmp_path)
    expected = scores(build(method, CASE, damping=0.7), CASE.test)
    no_measuring(monkeypatch)
    loaded = build(method, CASE, damping=0.7).load(tmp_path)
    assert_equal(scores(loaded, CASE.test), expected)
    # nor does setting it anew measure
    later = build(method, CASE).load(tmp_path)
    scores(later, CASE.test)
    later.damping = 0.7
    assert_equal(scores(later, CASE.test), expected)


@pytest.mark.parametrize("method", ["ExplicitInfluenceFunction", "EKFACInfluenceFunction"])
def test_batch_sizes_do_not_matter(method: str, tmp_path: Path) -> None:
    build(method, CASE, batch_size=4).save(tmp_path)
    found = scores(build(method, CASE, batch_size=3).load(tmp_path), CASE.test)
    expected = scores(build(method, CASE, batch_size=3), CASE.test)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", FITTED)
def test_a_second_save_replaces_the_first(method: str, tmp_path: Path) -> None:
    build(method, CASE, data=Examples(SHORT["mlp"].test)).save(tmp_path)
    build(method, CASE).save(tmp_path)
    assert [path.name.split("-")[0] for path in sorted(tmp_path.iterdir())] == [MANIFEST, TENSORS]
    build(method, CASE).load(tmp_path)


# What is refused.


class Other(nn.Module):
    """A loss of another value."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return 1.1 * CASE.loss(outputs, targets)


def slightly(case: Case, factor: float = 1 + 1e-6) -> list[dict[str, Any]]:
    """The checkpoints with one weight changed a little."""
    checkpoints = case.checkpoints()
    checkpoints[1]["state_dict"]["head.bias"][0] *= factor
    return checkpoints


def changed_data(case: Case) -> Examples:
    x, y = case.train
    x[3, 0] += 1e-9
    return Examples((x, y))


def swapped_data(case: Case) -> Examples:
    order = torch.tensor([1, 0, *range(2, case.n)])
    return Examples(tuple(t[order] for t in case.train))


DIFFERENCES: dict[str, tuple[Any, str]] = {
    "weights": (
        lambda: {"checkpoints": slightly(CASE)},
        "weights of the checkpoints: 1 of 2 entries differ \\(number 1: ",
    ),
    "fewer checkpoints": (
        lambda: {"checkpoints": CASE.checkpoints()[:1]},
        "weights of the checkpoints: 2 entries there, 1 here",
    ),
    "a value of the data": (
        lambda: {"hessian_dataset": changed_data(CASE)},
        r'hash of the examples: "[0-9a-f]+\.\.\. there, "[0-9a-f]+\.\.\. here',
    ),
    "the order of the data": (
        lambda: {"hessian_dataset": swapped_data(CASE)},
        "hash of the examples",
    ),
    "less data": (
        lambda: {"hessian_dataset": Examples(tuple(t[:9] for t in CASE.train))},
        "examples: 11 there, 9 here",
    ),
    "loss": (
        lambda: {"loss_fn": Other()},
        "losses of some examples: (\\d+) of \\1 entries differ \\(number 0: ",
    ),
    "seed": (lambda: {"seed": 1}, "seed: 0 there, 1 here"),
    "layers": (lambda: {"layers": ["head"]}, ""),
}


@pytest.mark.parametrize("name", DIFFERENCES)
@pytest.mark.parametrize(
    "method", ["ExplicitInfluenceFunction", "CGInfluenceFunction", "EKFACInfluenceFunction"]
)
def test_what_belongs_to_something_else_is_refused(
    method: str, name: str, tmp_path: Path, unchanged: Any
) -> None:
    build(method, CASE).save(tmp_path)
    changes, match = DIFFERENCES[name]
    other = build(method, CASE, **changes())
    with (
        unchanged(other.model),
        pytest.raises(InvalidArgumentError, match=f"was saved for something else: .*{match}"),
    ):
        other.load(tmp_path)


SETTINGS: dict[str, tuple[Any, dict[str, Any], dict[str, Any], str]] = {
    "curvature": (
        ExplicitInfluenceFunction,
        {"curvature": "ggn"},
        {"curvature": "empirical_fisher"},
        "ggn",
    ),
    "blocks": (ExplicitInfluenceFunction, {"blocks": "layer"}, {"blocks": "full"}, "body.0"),
    "order in a block": (
        ExplicitInfluenceFunction,
        {"blocks": {"one": ["head.weight", "head.bias"]}},
        {"blocks": {"one": ["head.bias", "head.weight"]}},
        "head",
    ),
    "rank": (NystromInfluenceFunction, {"rank": 5}, {"rank": 6}, "rank"),
    "curvature of layers": (
        EKFACInfluenceFunction,
        {"curvature": "fisher"},
        {"curvature": "empirical_fisher"},
        "fisher",
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_what_was_saved_with_other_settings_is_refused(name: str, tmp_path: Path) -> None:
    cls, first, second, match = SETTINGS[name]

    def make(own: dict[str, Any]) -> Any:
        model = CASE.model()
        return cls(
            model, Examples(CASE.train), [model.state_dict()], loss_fn=CASE.loss, damping=0.1, **own
        )

    make(first).save(tmp_path)
    make(first).load(tmp_path)
    with pytest.raises(InvalidArgumentError, match=f".*{match}.* there, .* here"):
        make(second).load(tmp_path)


# of an earlier version, which sampled labels for the Fisher matrix and counted their curvature
NEWER = ("fisher", "observations")


@pytest.mark.parametrize(
    ("method", "curvature", "match"),
    [
        ("ExplicitInfluenceFunction", "fisher", 'fisher: .* there, "at sampled slopes" here'),
        ("CGInfluenceFunction", "fisher", 'fisher: .* there, "at sampled slopes" here'),
        ("LoGra", "fisher", 'fisher: .* there, "at sampled slopes" here'),
        ("EKFACInfluenceFunction", "fisher", 'fisher: .* there, "at sampled slopes" here'),
        ("KFACInfluenceFunction", "empirical_fisher", r"observations: .* there, \["),
        ("ExplicitInfluenceFunction", "ggn", None),
        ("LoGra", "empirical_fisher", None),
    ],
)
def test_a_fisher_matrix_of_sampled_labels_is_refused(
    method: str, curvature: str, match: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"curvature": curvature, "damping": 0.1}
    description = FittedInverse.description

    def older(self: FittedInverse) -> dict[str, object]:
        found = description(self)
        return {key: value for key, value in found.items() if key not in NEWER}

    monkeypatch.setattr(FittedInverse, "description", older)
    build(method, CASE, **own).save(tmp_path)
    monkeypatch.undo()
    if match is None:
        build(method, CASE, **own).load(tmp_path)
        return
    with pytest.raises(InvalidArgumentError, match=f"was saved for something else: {match}"):
        build(method, CASE, **own).load(tmp_path)


def test_the_order_of_blocks_is_a_setting(tmp_path: Path) -> None:
    """Blocks are kept by their number."""
    blocks = {"one": ["head.weight"], "two": ["body.0.weight"]}
    build("ExplicitInfluenceFunction", CASE, blocks=blocks, damping=0.1).save(tmp_path)
    turned = dict(reversed(blocks.items()))
    other = build("ExplicitInfluenceFunction", CASE, blocks=turned, damping=0.1)
    expected = scores(
        build("ExplicitInfluenceFunction", CASE, blocks=turned, damping=0.1), CASE.test
    )
    try:
        other.load(tmp_path)
    except InvalidArgumentError:
        return
    assert torch.allclose(scores(other, CASE.test), expected)


def test_another_method_is_refused(tmp_path: Path) -> None:
    build("KFACInfluenceFunction", CASE).save(tmp_path)
    match = 'method: "KFACInfluenceFunction" there, "EKFACInfluenceFunction" here'
    with pytest.raises(InvalidArgumentError, match=match):
        build("EKFACInfluenceFunction", CASE).load(tmp_path)


def test_another_precision_is_refused(tmp_path: Path) -> None:
    build("ExplicitInfluenceFunction", CASE).save(tmp_path)
    model = CASE.model().float()
    x, y = CASE.train
    other = ExplicitInfluenceFunction(
        model, Examples((x.float(), y)), [CASE.states[0]], loss_fn=CASE.loss
    )
    with pytest.raises(
        InvalidArgumentError, match=r'dtype: "torch.float64" there, "torch.float32"'
    ):
        other.load(tmp_path)


def test_a_refused_folder_leaves_what_was_fitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build("ExplicitInfluenceFunction", CASE, seed=1).save(tmp_path)
    explainer = build("ExplicitInfluenceFunction", CASE)
    expected = scores(explainer, CASE.test)
    no_measuring(monkeypatch)
    with pytest.raises(InvalidArgumentError, match="was saved for something else"):
        explainer.load(tmp_path)
    assert_equal(scores(explainer, CASE.test), expected)


# Folders that are not whole.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_folder(tmp_path, {"a": torch.arange(6).view(2, 3)}, {"for": "a test", "number": 1.5})
    return tmp_path


DESCRIPTION = {"for": "a test", "number": 1.5}


def test_a_folder_gives_back_its_tensors(folder: Path) -> None:
    found = read_folder(folder, DESCRIPTION)
    assert found.keys() == {"a"}
    assert torch.equal(found["a"], torch.arange(6).view(2, 3))


@pytest.mark.parametrize("tensors", [{}, {"t": torch.ones(3, 2).T}, {"s": torch.tensor(2.5)}])
def test_any_tensors_can_be_written(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    write_folder(tmp_path / "new" / "folder", tensors, DESCRIPTION)
    found = read_folder(tmp_path / "new" / "folder", DESCRIPTION)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_numbers_may_differ_by_rounding_and_nothing_else_may(folder: Path) -> None:
    read_folder(folder, {"for": "a test", "number": 1.5 * (1 + 1e-10)})
    for number in (1.5 * (1 + 1e-7), 2, "1.5", None, [1.5]):
        with pytest.raises(InvalidArgumentError, match=r"number: 1\.5 there, .* here"):
            read_folder(folder, {"for": "a test", "number": number})


def test_every_difference_is_told(folder: Path) -> None:
    match = 'extra: null there, "x" here; for: "a test" there, "another" here; number: 1.5 there'
    with pytest.raises(InvalidArgumentError, match=match):
        read_folder(folder, {"for": "another", "extra": "x"})


@pytest.mark.parametrize(
    ("there", "here", "told"),
    [
        (list(range(40)), [*range(39), 7], "1 of 40 entries differ (number 39: 39 there, 7 here)"),
        (list(range(40)), list(range(50)), "40 entries there, 50 here."),
        ([0, *range(40)], [1, *range(9)], "41 entries there, 10 here (number 0: 0 there, 1 here)"),
        ([1, 2, 3], [1, 2, 4], "[1, 2, 3] there, [1, 2, 4] here"),
        (
            [[0.5] * 30, [0.25] * 30],
            [[0.5] * 30, [0.25] * 9 + [0.3] * 21],
            "1 of 2 entries differ (number 1: 21 of 30 entries differ (number 9: 0.25 there, 0.3 h",
        ),
        ("ab" * 32, "cd" * 32, '"abababababababababababa... there, "cdcdcdcdcdcdcdcdcdcdcdc... h'),
        ("x" * 80 + "a.", "x" * 80 + "b.", '...xxxxxxxxxxxxa." there, ...xxxxxxxxxxxxb." here'),
        ([1.5] * 40, None, "[1.5, 1.5, 1.5, 1.5, 1.5... there, null here"),
    ],
)
def test_differences_are_short(there: Any, here: Any, told: str, tmp_path: Path) -> None:
    """No list is shown whole, and what is cut out of a text is where it differs."""
    write_folder(tmp_path, {}, {"key": there})
    with pytest.raises(InvalidArgumentError, match=re.escape(f"key: {told}")):
        read_folder(tmp_path, {"key": here})


def test_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_module, "FORMAT", 3)
    write_folder(tmp_path, {}, DESCRIPTION)
    monkeypatch.undo()
    with pytest.raises(InvalidArgumentError, match=r"has format 3; .* reads format 2: save it"):
        read_folder(tmp_path, DESCRIPTION)


def test_a_folder_without_a_manifest_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / MANIFEST).unlink()
    for place in (folder, tmp_path / "nothing"):
        match = f"incomplete folder: {place} holds no {MANIFEST}"
        with pytest.raises(InvalidArgumentError, match=match):
            read_folder(place, DESCRIPTION)


@pytest.mark.parametrize("text", ["", '{"for": "a te', "[1]"])
def test_a_manifest_that_is_cut_off_is_refused(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_text(text)
    with pytest.raises(InvalidArgumentError, match=MANIFEST):
        read_folder(folder, DESCRIPTION)


@pytest.mark.parametrize("size", [None, 0, 5, -8])
def test_tensors_that_are_cut_off_are_refused(folder: Path, size: int | None) -> None:
    (path,) = folder.glob(f"{TENSORS}-*")
    data = path.read_bytes()
    path.unlink()
    if size is not None:
        path.write_bytes(data[:size])
    with pytest.raises(InvalidArgumentError, match=f"{path.name} .*; save it again"):
        read_folder(folder, DESCRIPTION)


STEPS = ["tensor_files.write_file", "atomic.os.fsync", "manifest.write_file"]


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("step", STEPS)
def test_a_save_that_is_killed_loses_nothing_that_was_saved(
    step: str, again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if again:
        write_folder(tmp_path, {"a": torch.zeros(2)}, DESCRIPTION)

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt("killed")

    with monkeypatch.context() as patch:
        patch.setattr(f"influence_kit.storage.{step}", killed)
        with pytest.raises(KeyboardInterrupt, match="killed"):
            write_folder(tmp_path, {"a": torch.ones(2)}, DESCRIPTION)
    if again:
        assert torch.equal(read_folder(tmp_path, DESCRIPTION)["a"], torch.zeros(2))
    else:
        with pytest.raises(InvalidArgumentError, match=f"holds no {MANIFEST}"):
            read_folder(tmp_path, DESCRIPTION)
    write_folder(tmp_path, {"a": torch.ones(2)}, DESCRIPTION)
    assert torch.equal(read_folder(tmp_path, DESCRIPTION)["a"], torch.ones(2))
    assert [path.name.split("-")[0] for path in sorted(tmp_path.iterdir())] == [MANIFEST, TENSORS]


# The hash of a data set.


def batches(*sizes: int, key: str | None = None, change: float = 0.0) -> list[Any]:
    x, y = torch.arange(24.0).view(8, 3), torch.arange(8)
    x[5, 1] += change
    found: list[Any] = []
    for part, labels in zip(x.split(list(sizes)), y.split(list(sizes)), strict=True):
        found.append((part, labels) if key is None else {"x": part, key: labels})
    return found


def test_the_hash_is_of_values_and_not_of_batches() -> None:
    one = hash_of(batches(8))
    assert hash_of(batches(3, 4, 1)) == one
    assert hash_of(batches(3, 4, 1, change=1e-7)) == one, "1e-7 is lost in float32 here"
    assert hash_of(batches(3, 4, 1, change=1e-3)) != one
    assert hash_of([(x.double(), y) for x, y in batches(8)]) != one
    assert hash_of([(x, y.flip(0)) for x, y in batches(8)]) != one
    assert hash_of([(x[:-1], y[:-1]) for x, y in batches(8)]) != one
    assert hash_of([(x.T.contiguous().T, y) for x, y in batches(8)]) == one


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.bool, torch.uint8, torch.complex64]
)
def test_tensors_of_every_type_have_a_hash(dtype: torch.dtype) -> None:
    one, other = torch.zeros(3, 2).to(dtype), torch.ones(3, 2).to(dtype)
    assert hash_of([(one,)]) == hash_of([(one[:2],), (one[2:],)])
    assert hash_of([(one,)]) != hash_of([(other,)])


def description(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / MANIFEST).read_text())["description"]
    return found


def test_loading_reads_no_gradients(tmp_path: Path) -> None:
    """Iterative methods save no matrix: nothing but traces and the damping by rule."""
    model = CASE.model()
    arguments: dict[str, Any] = {"loss_fn": CASE.loss, "damping": 0.5}
    cg = CGInfluenceFunction(model, Examples(CASE.train), [model.state_dict()], **arguments)
    cg.save(tmp_path)
    assert read_folder(tmp_path, description(tmp_path)) == {}
    cg.damping = "auto"
    cg.save(tmp_path)
    found = read_folder(tmp_path, description(tmp_path))
    assert sorted(found) == ["0/trace_damping", "0/traces"]


class Twisted(nn.Module):
    """A model whose forward differs for examples beyond the first eight alone."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2).double()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.where(x[:, :1] >= 8, self.factor, 1.0)
        return self.linear(x) * scale


ROWS = torch.stack([torch.arange(40.0), torch.linspace(-1, 1, 40)], dim=1).double()
LABELS = torch.arange(40) // 8 % 2  # the first eight are 0
DATA = TensorDataset(ROWS, LABELS)
PLAIN = nn.CrossEntropyLoss()
WEIGHTED = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0]).double(), reduction="sum")


def confident(outputs: Tensor, labels: Tensor) -> Tensor:
    """Losses that are tiny: below any absolute tolerance."""
    return 1e-9 * torch.nn.functional.cross_entropy(outputs, labels, reduction="none")


@pytest.mark.parametrize(
    ("there", "here", "match"),
    [
        ({}, {"loss_fn": WEIGHTED}, "losses of some examples"),
        ({}, {"factor": 3.0}, "losses of some examples"),
        (
            {"loss_fn": confident},
            {"loss_fn": lambda o, y: 2 * confident(o, y)},
            "losses of some examples",
        ),
        ({}, {"layers": ["linear"], "frozen": "bias"}, "parameters"),
        ({}, {"seed": 9}, "seed: 0 there, 9 here"),
    ],
)
@pytest.mark.parametrize("kind", ["store", "fit"])
def test_what_differs_a_little_is_something_else(
    kind: str, there: dict[str, Any], here: dict[str, Any], match: str, tmp_path: Path
) -> None:
    def made(
        loss_fn: Any = PLAIN, factor: float = 1.0, seed: int = 0, frozen: str = "", **own: Any
    ) -> LoGra:
        torch.manual_seed(0)
        model = Twisted(factor)
        if frozen:
            model.linear.get_parameter(frozen).requires_grad_(False)
            own = {}
        store = {"store": tmp_path / "store"} if kind == "store" else {}
        states = [model.state_dict()]
        return LoGra(model, DATA, states, loss_fn=loss_fn, seed=seed, **store, **own)

    first, other = made(**there), made(**here)
    inputs = (ROWS[:3], LABELS[:3])
    if kind == "store":
        first.influence(inputs)
        with pytest.raises(InvalidArgumentError, match=match):
            other.influence(inputs)
    else:
        first.save(tmp_path / "fit")
        with pytest.raises(InvalidArgumentError, match=match):
            other.load(tmp_path / "fit")
