"""Curvature of the mean loss over a data set: models and data that are awkward, against dense."""

import gc
from itertools import pairwise
from typing import Any

import influence_oracles as dense
import oracles
import pytest
import torch
from cases import CASES, Examples, TanhMLP, cross_entropy
from contract import assert_close
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import influence_kit
from influence_kit import CGInfluenceFunction, ExplicitInfluenceFunction
from influence_kit.curvature import curvature as curvature_module
from influence_kit.curvature.passes import DataSet
from influence_kit.errors import InvalidArgumentError

CPU = torch.device("cpu")
N, DAMPING = 11, 0.2
# above the lowest eigenvalue of the Hessians here
RAISED = 2.0
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(N, 4, generator=GENERATOR, dtype=torch.float64)
Y = torch.arange(N) % 3
TRAIN, TEST = (X, Y), (X[:3] + 0.5, Y[:3])
DERIVED = ["hessian", "ggn"]
EXACT = [*DERIVED, "empirical_fisher"]


def explicit(model: nn.Module, train: Any = TRAIN, **arguments: Any) -> ExplicitInfluenceFunction:
    damping = damping_of(arguments.get("curvature", "ggn"))
    defaults = {"damping": damping, "loss_fn": cross_entropy, "batch_size": 4}
    return ExplicitInfluenceFunction(
        model, Examples(train), [model.state_dict()], **defaults | arguments
    )


def damping_of(curvature: str) -> float:
    return RAISED if curvature == "hessian" else DAMPING


def expected(
    model: nn.Module,
    curvature: str,
    train: Any = TRAIN,
    test: Any = TEST,
    loss: Any = cross_entropy,
) -> Tensor:
    matrix = dense.CURVATURES[curvature](model, train, loss)
    inverse = torch.linalg.inv(matrix + damping_of(curvature) * torch.eye(len(matrix)).double())
    h, g = (oracles.gradients(model, batch, loss) for batch in (test, train))
    return dense.scores(inverse, h, g)


def seeded(build: Any) -> nn.Module:
    torch.manual_seed(0)
    return build().double()


# Data sets.


def test_a_data_set_gives_places_and_a_count() -> None:
    data = DataSet([(X[:4], Y[:4]), (X[4:9], Y[4:9])], CPU)
    assert [places.tolist() for places, _ in data] == [[0, 1, 2, 3], [4, 5, 6, 7, 8]]
    assert data.count == 9
    assert DataSet([(X[:4], Y[:4]), (X[4:9], Y[4:9])], CPU).count == 9
    assert torch.equal(data.first()[0], X[:4])


def test_an_empty_data_set_is_refused() -> None:
    for ask in (lambda data: data.first(), list, lambda data: data.count):
        with pytest.raises(InvalidArgumentError, match=r"`hessian_dataset` .* is empty"):
            ask(DataSet([], CPU))


class Counted(TensorDataset):
    """How often each example is read."""

    def __init__(self, *tensors: Tensor) -> None:
        super().__init__(*tensors)
        self.reads = 0

    def __getitem__(self, place: int) -> Any:
        self.reads += 1
        return super().__getitem__(place)


@pytest.mark.filterwarnings("ignore:conjugate gradients stopped")
@pytest.mark.parametrize("curvature", EXACT)
@pytest.mark.parametrize("queries", [1, 100])
def test_an_iteration_reads_the_data_once_whatever_the_queries(
    curvature: str, queries: int
) -> None:
    inputs = (torch.randn(queries, 4).double(), torch.arange(queries) % 3)
    model = seeded(TanhMLP)

    def reads(iterations: int) -> list[int]:
        """How often the examples are read by a first and a second question."""
        data, found = Counted(X, Y), [0]
        cg = CGInfluenceFunction(
            model,
            Examples(TRAIN),
            [model.state_dict()],
            loss_fn=cross_entropy,
            damping=1.5 if curvature == "hessian" else 1e-4,
            curvature=curvature,
            hessian_dataset=data,
            batch_size=N,
            max_iter=iterations,
            tol=0.0,
            preconditioner=None,
        )
        for _ in range(2):
            cg.influence(inputs)
            found.append(data.reads)
        return [after - before for before, after in pairwise(found)]

    # all questions see a few examples beforehand
    few, more = reads(10), reads(14)
    assert [b - a for a, b in zip(few, more, strict=True)] == [4 * N, 4 * N]


@pytest.mark.parametrize("blocks", ["full", "layer"])
@pytest.mark.parametrize("share", [1.0, 1e-4])
def test_few_examples_of_very_many_parameters(blocks: str, share: float) -> None:
    """The empirical Fisher of 120,803 of them would take 109 GiB, written out."""
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 15_100), nn.Tanh(), nn.Linear(15_100, 3)))
    h, g = (oracles.gradients(model, batch, cross_entropy) for batch in (TEST, TRAIN))
    sizes = [h.shape[1]] if blocks == "full" else [75_500, 45_303]
    scores, dampings = torch.zeros(3, N, dtype=torch.float64), {}
    for name, *sides in zip(
        {"full": ["full"], "layer": ["0", "2"]}[blocks],
        h.split(sizes, 1),
        g.split(sizes, 1),
        strict=True,
    ):
        # by the singular vectors of the gradients, of which each training gradient is made
        _, singular, right = torch.linalg.svd(sides[1], full_matrices=False)
        values = singular.square() / N
        dampings[name] = share * float(values.median())
        inside = (sides[0] @ right.T) / (values + dampings[name])
        scores += inside @ (sides[1] @ right.T).T
    found = explicit(model, curvature="empirical_fisher", blocks=blocks, damping=dampings)
    assert_close(found.influence(TEST), scores, 1e-8)


def test_the_gradients_of_few_examples_are_what_memory_must_hold(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And their inner products three times: kept, decomposed and in between."""
    model, need = seeded(TanhMLP), 8 * (N * 83 + 3 * N**2)
    for free in (need - 1, need):
        monkeypatch.setattr(
            "influence_kit.curvature.operator_inverses.free_bytes",
            lambda device, f=free: f,
        )
        few = explicit(model, curvature="empirical_fisher")
        if free < need:
            with pytest.raises(InvalidArgumentError, match="blocks of up to 83 parameters take"):
                few.influence(TEST)
        else:
            assert_close(few.influence(TEST), expected(model, "empirical_fisher"), 1e-8)


# Models.


class Ramp(torch.autograd.Function):
    """A tanh that is defined as users do, for backward mode alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return slope * (1 - x.tanh().square())


class Custom(nn.Module):
    def __init__(self, function: Any = torch.tanh) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 3), nn.Linear(3, 3)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self.first(x)))


@pytest.mark.parametrize("curvature", DERIVED)
@pytest.mark.parametrize("blocks", ["full", "layer"])
def test_an_operation_without_forward_mode_is_differentiated_backwards(
    curvature: str, blocks: str, unchanged: Any
) -> None:
    model, plain = seeded(lambda: Custom(Ramp.apply)), seeded(Custom)
    arguments = {"curvature": curvature, "blocks": blocks, "damping": 2.0}
    with (
        unchanged(model),
        pytest.warns(UserWarning, match="without forward-mode derivative .* two reverse passes"),
    ):
        found = explicit(model, **arguments).influence(TEST)
    assert_close(found, explicit(plain, **arguments).influence(TEST))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.one(x).tanh()))


class Unused(Custom):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(2, 2)


class Scalar(Custom):
    """A scale that is a parameter without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class Dropping(Custom):
    def __init__(self) -> None:
        super().__init__(nn.Dropout(0.5))


AWKWARD = {"tied": Tied, "unused": Unused, "scalar": Scalar}


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize("curvature", DERIVED)
@pytest.mark.filterwarnings("ignore:.*no gradient rule fits.*")
def test_models_with_tied_unused_and_scalar_parameters(name: str, curvature: str) -> None:
    model = seeded(AWKWARD[name])
    found = explicit(model, curvature=curvature).influence(TEST)
    assert_close(found, expected(model, curvature))


@pytest.mark.filterwarnings("ignore:.*no gradient rule fits.*")
@pytest.mark.parametrize("method", ["TracInCP", "DataInf"])
def test_a_scalar_parameter_where_gradients_alone_are_wanted(method: str) -> None:
    model = seeded(Scalar)
    make = getattr(influence_kit, method)
    found = make(model, Examples(TRAIN), [model.state_dict()], loss_fn=cross_entropy)
    assert found.influence(TEST).shape == (3, N)


@pytest.mark.parametrize("curvature", EXACT)
def test_frozen_parameters_are_constants(curvature: str) -> None:
    model = seeded(Custom)
    model.first.requires_grad_(False)
    matrix = dense.CURVATURES[curvature](model.requires_grad_(True), TRAIN, cross_entropy)
    model.first.requires_grad_(False)
    names = ["head.weight", "head.bias"]
    inverse = dense.block_inverse(model, matrix, {"head": names}, damping_of(curvature))
    h, g = (
        oracles.gradients(model.requires_grad_(True), batch, cross_entropy)
        for batch in (TEST, TRAIN)
    )
    model.first.requires_grad_(False)
    found = explicit(model, curvature=curvature)
    assert found.block_names == ["full"]
    assert_close(found.influence(TEST), dense.scores(inverse, h, g))
    assert found.compute_intermediate_quantities(TEST).shape == (3, 12)


@pytest.mark.parametrize("curvature", DERIVED)
def test_dropout_is_off(curvature: str) -> None:
    model = seeded(Dropping).train()
    plain = seeded(lambda: Custom(lambda x: x))
    assert_close(
        explicit(model, curvature=curvature).influence(TEST),
        explicit(plain, curvature=curvature).influence(TEST),
    )


class Wrapped(Custom):
    """A model that returns more than its logits, not all of it floating-point."""

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        hidden = self.first(x).tanh()
        logits = self.head(hidden)
        return {"hidden": [hidden], "logits": logits, "best": logits.argmax(1), "none": None}


@pytest.mark.parametrize("curvature", EXACT)
def test_outputs_of_any_structure(curvature: str) -> None:
    def loss(outputs: Any, targets: Tensor) -> Tensor:
        assert outputs["none"] is None
        assert not outputs["best"].is_floating_point()
        return cross_entropy(outputs["logits"], targets)

    found = explicit(seeded(Wrapped), curvature=curvature, loss_fn=loss).influence(TEST)
    assert_close(found, explicit(seeded(Custom), curvature=curvature).influence(TEST))


def test_the_gauss_newton_matrix_is_of_all_outputs_that_the_loss_takes() -> None:
    def loss(outputs: Any, targets: Tensor) -> Tensor:
        return cross_entropy(outputs["logits"], targets) + outputs["hidden"][0].pow(2).sum(1)

    class Both(Wrapped):
        def forward(self, x: Tensor) -> Any:  # type: ignore[override]
            outputs = super().forward(x)
            return torch.cat([outputs["hidden"][0], outputs["logits"]], dim=1)

    def loss_of_both(outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(outputs[:, 3:], targets) + outputs[:, :3].pow(2).sum(1)

    found = explicit(seeded(Wrapped), loss_fn=loss).influence(TEST)
    assert_close(found, expected(seeded(Both), "ggn", loss=loss_of_both))


class Square(nn.Module):
    """A model that returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[:, 0].square()


def test_without_a_loss_the_hessian_is_that_of_the_output() -> None:
    model = seeded(Square)
    found = explicit(model, curvature="hessian", loss_fn=None).influence(TEST)
    assert_close(found, expected(model, "hessian", loss=lambda outputs, _: outputs))


def test_without_a_loss_there_is_no_gauss_newton_matrix(unchanged: Any) -> None:
    """The output is its own loss, without curvature in the output: all scores would be products."""
    model = seeded(Square)
    with unchanged(model), pytest.raises(InvalidArgumentError, match="loss_fn"):
        explicit(model, loss_fn=None).influence(TEST)


def language_model() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=5, n_positions=5, n_embd=4, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("curvature", EXACT)
def test_a_hugging_face_models_own_loss(curvature: str) -> None:
    """Against the same model and loss with plain tensors."""
    model = seeded(language_model)
    ids = torch.randint(0, 5, (6, 5))
    batch = {"input_ids": ids, "labels": ids.clone()}
    batch["labels"][1, 3:] = -100

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor) -> Tensor:
            return self.model(input_ids=ids).logits

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
        return losses.sum(1) / (labels[:, 1:] >= 0).sum(1)

    layers = ["transformer.h.0.mlp.c_proj"]
    arguments = {"layers": layers, "curvature": curvature, "damping": 60.0, "batch_size": 4}
    found = explicit(model, batch, loss_fn=None, **arguments)
    arguments["layers"] = [f"model.{layer}" for layer in layers]
    plain = explicit(Plain(), (ids, batch["labels"]), loss_fn=loss, **arguments)
    # the package's own loss of tokens is computed in float32 whatever the model
    assert_close(found.influence(batch), plain.influence((ids, batch["labels"])), 1e-5)


@pytest.mark.parametrize("curvature", [*EXACT, "fisher"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision(curvature: str, dtype: torch.dtype, unchanged: Any) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).to(dtype)
    train, test = ((x.to(dtype), y) for x, y in (TRAIN, TEST))
    explainer = explicit(model, train, curvature=curvature)
    if curvature in DERIVED:
        match = f"second derivatives of a model in {dtype} are mostly rounding"
        with unchanged(model), pytest.raises(InvalidArgumentError, match=match):
            explainer.influence(test)
        return
    found = explainer.influence(test)
    assert found.dtype == torch.float32
    double = nn.Linear(4, 3).double()
    double.load_state_dict(model.state_dict())
    train, test = ((x.double(), y) for x, y in (train, test))
    exact = explicit(double, train, curvature=curvature).influence(test)
    assert_close(found.double(), exact, 0.05)


# How it is computed.


@pytest.mark.parametrize("curvature", EXACT)
def test_little_memory_makes_pieces_and_the_same_scores(
    curvature: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES["mlp"]

    def scores() -> Tensor:
        model = case.model()
        return ExplicitInfluenceFunction(
            model,
            Examples(case.train),
            [model.state_dict()],
            loss_fn=case.loss,
            curvature=curvature,
            blocks="layer",
            damping=3.0,
            layers=["body.2"],
            batch_size=5,
        ).influence(case.test)

    whole = scores()
    widths = []
    product = curvature_module.LossCurvature._piece_product

    def counted(self: Any, batch: Any, vectors: Tensor) -> Tensor:
        widths.append((len(batch[-1]), len(vectors)))
        return product(self, batch, vectors)

    monkeypatch.setattr(curvature_module.LossCurvature, "_piece_product", counted)
    monkeypatch.setattr(curvature_module, "workspace_bytes", lambda device: 20)
    assert_close(scores(), whole)
    if curvature in DERIVED:
        assert max(n for n, _ in widths) < 5, "no pieces"


def test_features_are_freed_when_the_question_is_answered() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3)))
    x, y = torch.randn(200, 64).double(), torch.arange(200) % 3
    inputs = (torch.randn(2, 64).double(), y[:2])

    def held() -> int:
        gc.collect()
        return sum(t.numel() for t in gc.get_objects() if isinstance(t, Tensor))

    options: dict[str, Any] = {"loss_fn": cross_entropy, "damping": 0.1, "layers": ["0"]}
    for method, own in (
        ("CGInfluenceFunction", {"curvature": "empirical_fisher"}),
        ("DataInf", {}),
        ("EKFACInfluenceFunction", {}),
    ):
        explainer = getattr(influence_kit, method)(
            model, TensorDataset(x, y), [model.state_dict()], **options, **own
        )
        explainer.fit()
        kept = held()
        explainer.influence(inputs)
        # one batch's inputs of the layer are 200 * 64 numbers
        assert held() - kept < 100 * 64, method


# Data.


class Batches:
    """Uneven batches, one by one."""

    def __iter__(self) -> Any:
        return iter([(X[:1], Y[:1]), (X[1:8], Y[1:8]), (X[8:], Y[8:])])


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(zip(X, Y, strict=True))


@pytest.mark.parametrize(
    "data",
    [
        Stream(),
        DataLoader(Stream(), batch_size=3),
        Batches(),
        DataLoader(TensorDataset(X, Y), batch_size=4, sampler=list(range(N))),
    ],
    ids=["iterable", "loader of an iterable", "batches", "sampler"],
)
@pytest.mark.parametrize("curvature", EXACT)
def test_hessian_data_of_any_kind(data: Any, curvature: str) -> None:
    model = seeded(Custom)
    found = explicit(model, (X[:5], Y[:5]), hessian_dataset=data, curvature=curvature)
    whole = explicit(model, curvature=curvature)
    assert_close(found.influence(TEST), whole.influence(TEST)[:, :5])


@pytest.mark.parametrize("blocks", ["full", "layer"])
def test_the_traces_of_outer_products(blocks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written out, and by their diagonals, which are exact too."""
    model = seeded(TanhMLP)

    def means() -> dict[str, float]:
        explainer = CGInfluenceFunction(
            model,
            Examples(TRAIN),
            [model.state_dict()],
            loss_fn=cross_entropy,
            curvature="empirical_fisher",
            blocks=blocks,
        )
        return explainer.fit().damping_used[0]

    small = means()
    monkeypatch.setattr("influence_kit.operators.operator.SMALL", 0)
    assert means() == pytest.approx(small, rel=1e-12)


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_torchs_squared_error_stays_in_forward_mode(curvature: str, reduction: str) -> None:
    """Its mean has no forward derivative of the second one; a warning would be an error here."""
    torch.manual_seed(0)
    x, y = torch.randn(8, 3).double(), torch.randn(8, 2).double()
    model, train = nn.Linear(3, 2).double(), TensorDataset(x, y)
    influence = ExplicitInfluenceFunction(
        model,
        train,
        [model.state_dict()],
        loss_fn=nn.MSELoss(reduction=reduction),
        curvature=curvature,
        damping=0.1,
    )
    # of the mean over both outputs the loss of an example is half of its sum
    share = 0.5 if reduction == "mean" else 1.0
    inputs = torch.cat([x, torch.ones(8, 1).double()], dim=1)
    covariance = inputs.T @ inputs / 8
    inverse = torch.linalg.inv(2 * share * covariance + 0.1 * torch.eye(4).double())
    residuals = 2 * share * (model(x) - y).detach()
    expected = (residuals @ residuals.T) * (inputs @ inverse @ inputs.T)
    assert torch.allclose(influence.influence((x, y)), expected, rtol=1e-9)
