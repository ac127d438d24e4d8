"""Mistakes with influence functions are told with what was got, and leave the model as it was."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import pytest
import torch
from contract import assert_close
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from turns import in_turn

import influence_kit
from influence_kit import (
    CGInfluenceFunction,
    EKFACInfluenceFunction,
    ExplicitInfluenceFunction,
    LiSSAInfluenceFunction,
    NystromInfluenceFunction,
)
from influence_kit.errors import CurvatureError, InvalidArgumentError, NonFiniteError

N = 11
X = torch.randn(N, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(N) % 3
DATA, TEST = TensorDataset(X, Y), (X[:4] + 1, Y[:4])
P = 3 * 4 + 4 + 4 * 3 + 3

OF_ANY_CURVATURE = [
    "ExplicitInfluenceFunction",
    "CGInfluenceFunction",
    "LiSSAInfluenceFunction",
    "NystromInfluenceFunction",
]
KRONECKER = ["KFACInfluenceFunction", "EKFACInfluenceFunction"]
CAPTUMS = ["NaiveInfluenceFunction", "ArnoldiInfluenceFunction"]
OURS = [*OF_ANY_CURVATURE, "DataInf", *KRONECKER]
# quick settings where the result does not matter
QUICK: dict[str, dict[str, Any]] = {
    "LiSSAInfluenceFunction": {"recursion_depth": 5, "scale": 50.0, "hessian_batch_size": None}
}
of_any_curvature = pytest.mark.parametrize("method", OF_ANY_CURVATURE)
ours = pytest.mark.parametrize("method", OURS)
every_method = pytest.mark.parametrize("method", [*OURS, *CAPTUMS])


@pytest.fixture
def model() -> nn.Module:
    """A model with gradients and with layers in both modes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    model(X).square().sum().backward()
    model.train()
    model[1].eval()
    return model


@pytest.fixture
def refused(unchanged: Any) -> Callable[..., Any]:
    """A context manager of what must fail with an error and leave the model as it was."""

    @contextmanager
    def block(model: nn.Module, error: type[Exception], match: str) -> Iterator[None]:
        with unchanged(model), pytest.raises(error, match=match):
            yield

    return block


def make(method: str, model: nn.Module, train: Any = DATA, **options: Any) -> Any:
    weights = {key: value + 0.1 for key, value in model.state_dict().items()}
    options = {"loss_fn": nn.CrossEntropyLoss(reduction="none"), "batch_size": 4} | options
    checkpoints = options.pop("checkpoints", [weights])
    if method in CAPTUMS:
        options.pop("damping", None)
        checkpoints = checkpoints[0]
    else:
        options = QUICK.get(method, {}) | options
    return getattr(influence_kit, method)(model, train, checkpoints, **options)


# Arguments of all.


NO_DAMPINGS = [
    (-0.1, r"`damping` must be a number that is not negative; got -0\.1"),
    (float("nan"), "`damping` must be a number that is not negative; got nan"),
    (float("inf"), "`damping` must be a number that is not negative; got inf"),
    (True, "`damping` must be a number that is not negative; got True"),
    (None, "`damping` must be a number that is not negative; got None"),
    ([0.1, 0.2], r"`damping` must be a number that is not negative; got \[0\.1, 0\.2\]"),
    ("big", r"`damping` must be a number, .* or one of \"auto\", .*; got 'big'"),
    ({"0": 0.1}, r"`damping` names the blocks \['0'\]; there are \['.*'\], and each needs one"),
    ({"a": 0.1, "0": 1, "2": 1}, r"`damping` names the blocks \['a', '0', '2'\]; there are"),
]


@in_turn("method, wrong", OURS, NO_DAMPINGS)
def test_a_damping_that_cannot_be_meant(
    model: nn.Module, refused: Any, method: str, wrong: tuple[Any, str]
) -> None:
    damping, match = wrong
    with refused(model, InvalidArgumentError, match):
        make(method, model, damping=damping)
    explainer = make(method, model, damping=0.3)
    with refused(model, InvalidArgumentError, match):
        explainer.damping = damping
    assert explainer.damping == 0.3


@ours
def test_a_damping_of_a_block_that_cannot_be_meant(
    model: nn.Module, refused: Any, method: str
) -> None:
    blocks = {"blocks": "layer"} if method in OF_ANY_CURVATURE else {}
    match = r"`damping` of block `2` must be a number that is not negative; got -1"
    with refused(model, InvalidArgumentError, match):
        make(method, model, damping={"0": 0.1, "2": -1}, **blocks)


@pytest.mark.parametrize("method", ["NystromInfluenceFunction", "DataInf", *KRONECKER])
def test_a_damping_of_zero_where_it_must_be_positive(
    model: nn.Module, refused: Any, method: str
) -> None:
    explainer = make(method, model, damping=0.0)
    with refused(model, InvalidArgumentError, "damping must be positive here"):
        explainer.influence(TEST)
    explainer.damping = 0.1
    assert explainer.influence(TEST).shape == (4, N)


@pytest.mark.parametrize("preconditioner", ["sample", "jacobi", "nystrom", "kfac", "ekfac"])
def test_preconditioners_want_a_positive_damping(
    model: nn.Module, refused: Any, preconditioner: str
) -> None:
    explainer = make("CGInfluenceFunction", model, damping=0.0, preconditioner=preconditioner)
    with refused(model, InvalidArgumentError, "damping must be positive here"):
        explainer.influence(TEST)


@ours
@pytest.mark.parametrize("relative", ["L", "both", True, 1])
def test_an_unknown_relative_form(
    model: nn.Module, refused: Any, method: str, relative: Any
) -> None:
    match = f'`relative` must be None, "theta" or "l"; got {relative!r}'
    with refused(model, InvalidArgumentError, match):
        make(method, model, relative=relative)


@of_any_curvature
@pytest.mark.parametrize("curvature", ["GGN", "kfac", None, 3])
def test_an_unknown_curvature(model: nn.Module, refused: Any, method: str, curvature: Any) -> None:
    match = "`curvature` must be one of ggn, hessian, fisher, empirical_fisher; got "
    with refused(model, InvalidArgumentError, match + repr(curvature)):
        make(method, model, curvature=curvature)


@of_any_curvature
@pytest.mark.parametrize(
    ("blocks", "match"),
    [
        ("Layer", '`blocks` must be "full", "layer", "parameter", or a dict of block names'),
        ({}, "`blocks` must be .* got {}"),
        (["0.weight"], r"`blocks` must be .* got \['0.weight'\]"),
        ({"a": "0.weight"}, "block 'a' must be a list of names .* got '0.weight', and there are"),
        ({"a": []}, r"block 'a' must be a list of names of chosen parameters; got \[\]"),
        ({"a": ["0.weight", "9.bias"]}, "block 'a' must be a list .* and there are"),
        (
            {"a": ["0.weight", "0.bias"], "b": ["2.bias", "0.bias"]},
            r"the parameters \['0.bias'\] occur more than once in `blocks`",
        ),
        ({"a": ["0.bias", "0.bias"]}, r"the parameters \['0.bias'\] occur more than once"),
    ],
)
def test_blocks_that_cannot_be_meant(
    model: nn.Module, refused: Any, method: str, blocks: Any, match: str
) -> None:
    with refused(model, InvalidArgumentError, match):
        make(method, model, blocks=blocks)


def test_blocks_of_parameters_that_were_not_chosen(model: nn.Module, refused: Any) -> None:
    with refused(model, InvalidArgumentError, r"and there are \['2.weight', '2.bias'\]"):
        make("CGInfluenceFunction", model, layers=["2"], blocks={"a": ["0.weight"]})


@pytest.mark.parametrize(
    ("method", "name", "values", "match"),
    [
        ("CGInfluenceFunction", "max_iter", [0, -1, 2.5, True, None], "must be a positive int"),
        (
            "CGInfluenceFunction",
            "tol",
            [-1e-3, float("nan"), float("inf"), True],
            "that is not negative",
        ),
        (
            "CGInfluenceFunction",
            "preconditioner",
            ["ilu", True],
            'must be None, "auto", "sample", "jacobi", "nystrom", "kfac", "ekfac" or an inverse',
        ),
        ("LiSSAInfluenceFunction", "recursion_depth", [0, 1.5, True], "must be a positive int"),
        ("LiSSAInfluenceFunction", "num_repeat", [0, -2, "3"], "must be a positive int"),
        ("LiSSAInfluenceFunction", "hessian_batch_size", [0, 2.0, False], "must be a positive int"),
        *(
            (method, "curvature", ["ggn", None], 'must be "fisher" or "empirical_fisher"')
            for method in KRONECKER
        ),
        *((method, "rtol", [-0.1, 1.0, 7, float("nan")], "and below 1") for method in KRONECKER),
    ],
)
def test_settings_that_cannot_be_meant(
    model: nn.Module, refused: Any, method: str, name: str, values: list[Any], match: str
) -> None:
    for value in values:
        with refused(model, InvalidArgumentError, f"`{name}` .*{match}.*; got {value!r}"):
            make(method, model, **{name: value})


@pytest.mark.parametrize(
    ("method", "name", "values", "match"),
    [
        ("LiSSAInfluenceFunction", "scale", [0.0, -1, "big", None], "must be a positive number"),
        ("NystromInfluenceFunction", "rank", [0, -1, 2.5, True], "must be a positive int"),
    ],
)
def test_settings_that_are_looked_at_when_they_are_wanted(
    model: nn.Module, refused: Any, method: str, name: str, values: list[Any], match: str
) -> None:
    for value in values:
        with refused(model, InvalidArgumentError, f"`{name}` {match}.*; got {value!r}"):
            make(method, model, damping=0.1, **{name: value}).influence(TEST)


# Data.


def spoiled(place: int) -> TensorDataset:
    x = X.clone()
    x[place, 1] = torch.nan
    return TensorDataset(x, Y)


@every_method
@pytest.mark.parametrize(("place", "damping"), [(0, 0.1), (7, "auto")])
def test_hessian_data_with_a_gradient_that_is_not_finite(
    model: nn.Module, refused: Any, method: str, place: int, damping: Any
) -> None:
    explainer = make(method, model, hessian_dataset=spoiled(place), damping=damping)
    with refused(model, NonFiniteError, "some example of `hessian_dataset`"):
        explainer.influence(TEST)


@pytest.mark.parametrize("method", OF_ANY_CURVATURE)
@pytest.mark.parametrize("curvature", ["hessian", "fisher", "empirical_fisher"])
def test_hessian_data_that_is_not_finite_for_every_curvature(
    model: nn.Module, refused: Any, method: str, curvature: str
) -> None:
    explainer = make(method, model, hessian_dataset=spoiled(7), damping=5.0, curvature=curvature)
    with refused(model, NonFiniteError, "some example of `hessian_dataset`"):
        explainer.influence(TEST)


@every_method
def test_hessian_data_without_examples(model: nn.Module, refused: Any, method: str) -> None:
    for empty in (TensorDataset(X[:0], Y[:0]), DataLoader(TensorDataset(X[:0], Y[:0]))):
        explainer = make(method, model, hessian_dataset=empty)
        with refused(model, InvalidArgumentError, "`hessian_dataset` .* is empty"):
            explainer.influence(TEST)


@every_method
def test_hessian_data_that_is_shuffled(model: nn.Module, refused: Any, method: str) -> None:
    match = r"`hessian_dataset` is a DataLoader that shuffles \(RandomSampler\)"
    with refused(model, InvalidArgumentError, match):
        make(method, model, hessian_dataset=DataLoader(DATA, batch_size=4, shuffle=True))


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(zip(X, Y, strict=True))


@every_method
def test_hessian_data_that_is_a_stream(model: nn.Module, method: str) -> None:
    own = {"curvature": "empirical_fisher"} if method not in (*CAPTUMS, "DataInf") else {}
    found = make(method, model, hessian_dataset=Stream(), **own)
    assert_close(found.influence(TEST), make(method, model, **own).influence(TEST), 1e-7)


def test_samples_of_a_stream_are_refused(model: nn.Module, refused: Any) -> None:
    explainer = make(
        "LiSSAInfluenceFunction", model, hessian_dataset=Stream(), hessian_batch_size=2
    )
    match = "no examples can be sampled from a DataLoader .* use `hessian_batch_size=None`"
    with refused(model, InvalidArgumentError, match):
        explainer.influence(TEST)


@pytest.mark.parametrize("curvature", ["ggn", "empirical_fisher", "fisher"])
@pytest.mark.parametrize("batch_size", [2, N])
@pytest.mark.parametrize("scale", [12.0, "auto"])
def test_samples_do_not_depend_on_the_batches_of_the_data(
    model: nn.Module, curvature: str, batch_size: int, scale: Any
) -> None:
    """Nor on what was computed of those batches before."""

    def scores(size: int) -> Tensor:
        explainer = make(
            "LiSSAInfluenceFunction",
            model,
            curvature=curvature,
            batch_size=size,
            hessian_batch_size=2,
            recursion_depth=10,
            num_repeat=2,
            damping=0.5,
            scale=scale,
        )
        return explainer.influence(TEST)

    assert_close(scores(batch_size), scores(1), 1e-9)


def test_samples_are_of_all_examples(model: nn.Module) -> None:
    """Every sample is drawn anew: one kept for its first example would not average out."""
    own: dict[str, Any] = {"curvature": "empirical_fisher", "damping": 0.5}
    explainer = make(
        "LiSSAInfluenceFunction",
        model,
        hessian_batch_size=4,
        recursion_depth=100,
        num_repeat=20,
        scale=10.0,
        **own,
    )
    exact = make("ExplicitInfluenceFunction", model, **own)
    found, expected = explainer.influence(TEST), exact.influence(TEST)
    assert (found - expected).norm() < 0.06 * expected.norm()


def test_samples_are_of_what_the_loader_reads(model: nn.Module) -> None:
    read: set[int] = set()

    class Noted(TensorDataset):
        def __getitem__(self, place: int) -> Any:
            read.add(int(place))
            return super().__getitem__(place)

    loader = DataLoader(Noted(X, Y), batch_size=4, sampler=[0, 2, 4, 6, 8])
    make(
        "LiSSAInfluenceFunction",
        model,
        hessian_dataset=loader,
        hessian_batch_size=2,
        recursion_depth=40,
    ).influence(TEST)
    assert read == {0, 2, 4, 6, 8}


# Curvature.


def test_an_indefinite_hessian_is_told_with_its_eigenvalues(model: nn.Module, refused: Any) -> None:
    explainer = make("ExplicitInfluenceFunction", model, curvature="hessian", damping=1e-6)
    match = (
        r"the curvature of block 'full' has \d+ negative eigenvalues: its 31 eigenvalues go from "
        r"-\S+ to \S+, and damping 1e-06 does not make it positive definite"
    )
    with refused(model, CurvatureError, match):
        explainer.influence(TEST)


def test_the_block_of_an_indefinite_hessian_is_named(model: nn.Module, refused: Any) -> None:
    explainer = make(
        "ExplicitInfluenceFunction",
        model,
        curvature="hessian",
        blocks="layer",
        damping={"0": 1e-6, "2": 9.0},
    )
    with refused(model, CurvatureError, "the curvature of block '0' has"):
        explainer.influence(TEST)


def test_a_singular_curvature_without_damping(model: nn.Module, refused: Any) -> None:
    explainer = make("ExplicitInfluenceFunction", model, damping=0.0)
    with refused(model, CurvatureError, "the curvature of block 'full' is singular: its 31"):
        explainer.influence(TEST)


@pytest.mark.parametrize(
    ("method", "match"),
    [
        ("CGInfluenceFunction", "along a direction, so it is not positive definite"),
        ("NystromInfluenceFunction", "is indefinite .* use curvature='ggn'"),
    ],
)
def test_solvers_on_an_indefinite_hessian(
    model: nn.Module, refused: Any, method: str, match: str
) -> None:
    explainer = make(method, model, curvature="hessian", damping=1e-6)
    with refused(model, CurvatureError, match):
        explainer.influence(TEST)


def test_a_lissa_that_diverges(model: nn.Module, refused: Any) -> None:
    explainer = make(
        "LiSSAInfluenceFunction",
        model,
        scale=1e-3,
        damping=0.1,
        recursion_depth=100,
        hessian_batch_size=2,
    )
    with refused(model, CurvatureError, "LiSSA diverges at scale 0.001"):
        explainer.influence(TEST)


def test_conjugate_gradients_that_do_not_finish(model: nn.Module, unchanged: Any) -> None:
    explainer = make("CGInfluenceFunction", model, damping=1e-5, max_iter=2)
    match = r"stopped after 2 iterations with relative residuals up to \S+ \(tol: 1e-06\) in 4 of"
    with unchanged(model), pytest.warns(UserWarning, match=match):
        explainer.influence(TEST)


def test_a_block_that_memory_does_not_hold(
    model: nn.Module, refused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    explainer = make("ExplicitInfluenceFunction", model)
    monkeypatch.setattr(
        "influence_kit.curvature.operator_inverses.free_bytes", lambda device: 10 * P**2
    )
    match = r'blocks of up to 31 parameters take \S+ GiB.* Use blocks="layer", `layers`, or'
    with refused(model, InvalidArgumentError, match):
        explainer.influence(TEST)


def test_blocks_that_memory_does_not_hold_together(
    model: nn.Module, refused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All are kept, and their factors."""
    explainer = make("ExplicitInfluenceFunction", model, blocks="layer")
    kept = 8 * 2 * (16**2 + 15**2)
    assert kept > 3 * 8 * 16**2
    monkeypatch.setattr(
        "influence_kit.curvature.operator_inverses.free_bytes", lambda device: kept - 1
    )
    with refused(model, InvalidArgumentError, "GiB"):
        explainer.influence(TEST)


@ours
def test_automatic_damping_of_a_layer_without_gradients(refused: Any, method: str) -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.spare = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x) + 0 * self.spare(x)

    model = Unused().double()
    own: dict[str, Any] = {"blocks": "layer"} if method in OF_ANY_CURVATURE else {}
    rule = "mean" if method in KRONECKER else "auto"
    explainer = make(method, model, damping=rule, **own)
    match = rf'damping="{rule}" is a share of the mean eigenvalue .* which is 0 in block \'spare\''
    with refused(model, InvalidArgumentError, match):
        explainer.influence(TEST)


# Quantities.


@ours
@pytest.mark.parametrize("shape", [(2, P), (2, P + 1), (2 * P,), (1, 2, 2 * P)])
def test_quantities_of_another_shape(
    model: nn.Module, refused: Any, method: str, shape: tuple[int, ...]
) -> None:
    weights = [{k: v + s for k, v in model.state_dict().items()} for s in (0.1, 0.2)]
    explainer = make(method, model, checkpoints=weights)
    match = (
        rf"`inputs` is a tensor of shape .* have shape \[m, {2 * P}\] here \(2 checkpoints x {P} "
        "parameters"
    )
    with refused(model, InvalidArgumentError, match):
        explainer.influence(torch.zeros(*shape))


# Weights that change.


@every_method
def test_weights_that_change_after_the_fit(model: nn.Module, refused: Any, method: str) -> None:
    weights = {key: value + 0.1 for key, value in model.state_dict().items()}
    explainer = make(method, model, checkpoints=[weights])
    before = explainer.influence(TEST)
    weights["2.weight"].mul_(1.5)
    match = "checkpoint 0 holds other weights than when the curvature was measured; call `fit()`"
    match = match.replace("(", r"\(").replace(")", r"\)")
    for question in (
        lambda: explainer.influence(TEST),
        lambda: explainer.influence(TEST, k=2),
        lambda: explainer.self_influence(),
        lambda: explainer.compute_intermediate_quantities(TEST),
    ):
        with refused(model, InvalidArgumentError, match):
            question()
    assert explainer.fit() is explainer
    after = explainer.influence(TEST)
    assert_close(after, make(method, model, checkpoints=[deepcopy(weights)]).influence(TEST), 1e-9)
    assert not torch.allclose(after, before)


@ours
def test_checkpoints_that_are_set_anew_are_fitted_anew(model: nn.Module, method: str) -> None:
    other = {key: value - 0.3 for key, value in model.state_dict().items()}
    explainer = make(method, model)
    explainer.influence(TEST)
    explainer.checkpoints = [other]
    assert explainer.damping_used == []
    expected = make(method, model, checkpoints=[other]).influence(TEST)
    assert_close(explainer.influence(TEST), expected, 1e-9)


@every_method
def test_an_error_amid_the_fit_leaves_nothing_half_measured(
    model: nn.Module, unchanged: Any, method: str
) -> None:
    calls = 0

    class Fails(nn.Module):
        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            if calls == 12:
                raise KeyboardInterrupt("Ctrl-C")
            return F.cross_entropy(outputs, targets, reduction="none")

    own = {"curvature": "empirical_fisher"} if method in (*OF_ANY_CURVATURE, *KRONECKER) else {}
    explainer = make(method, model, loss_fn=Fails(), batch_size=1, **own)
    with unchanged(model), pytest.raises(KeyboardInterrupt, match="Ctrl-C"):
        explainer.influence(TEST)
    expected = make(method, model, batch_size=1, **own).influence(TEST)
    assert_close(explainer.influence(TEST), expected)


def test_every_class_is_what_it_says() -> None:
    """The classes that this file names are all that there are."""
    there = {
        name
        for name in influence_kit.__all__
        if isinstance(found := getattr(influence_kit, name), type)
        and issubclass(found, influence_kit.InfluenceFunction)
    }
    # of projected gradients, whose errors are in ``test_logra``, ``test_trak``, ``test_trackstar``
    projected = {"LoGra", "GraSS", "FactGraSS", "TRAK", "TrackStar"}
    # whose errors are in ``test_source``
    there -= {"InfluenceFunction", "SOURCE"}
    assert there == {*OURS, *CAPTUMS, *projected}
    assert {
        cls.__name__
        for cls in (
            CGInfluenceFunction,
            EKFACInfluenceFunction,
            ExplicitInfluenceFunction,
            LiSSAInfluenceFunction,
            NystromInfluenceFunction,
        )
    } <= there


def test_the_signature_shows_the_common_arguments() -> None:
    shown = list(inspect.signature(influence_kit.EKFACInfluenceFunction).parameters)
    assert shown[:6] == [
        "model",
        "train_dataset",
        "checkpoints",
        "checkpoints_load_func",
        "layers",
        "loss_fn",
    ]
    assert {"eval_mode", "damping", "curvature", "rtol"} <= set(shown)
    assert "args" not in shown
    assert "kwargs" not in shown
