"""Complex parameters: score = Re(conj(g) . g'), against autograd one example at a time."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import TensorDataset

import influence_kit
from influence_kit import (
    CGInfluenceFunction,
    DataInf,
    DVEmb,
    EKFACInfluenceFunction,
    ExplicitInfluenceFunction,
    GradCos,
    GradDot,
    KNNShapley,
    LiSSAInfluenceFunction,
    LoGra,
    NaiveInfluenceFunction,
    NystromInfluenceFunction,
    RepresenterPointSelection,
    SimilarityInfluence,
    TracInCPFast,
    TracInCPRandProj,
    TrainingTrace,
)
from influence_kit.errors import InvalidArgumentError

N, M = 11, 3
LOSS = nn.CrossEntropyLoss()
pytestmark = pytest.mark.filterwarnings("ignore:.*no gradient rule")


class Waves(nn.Module):
    """Real layers, a complex one, a complex and a real parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5).double()
        self.mix = nn.Linear(5, 3, dtype=torch.cdouble)
        self.scale = nn.Parameter(torch.randn(3, dtype=torch.cdouble))
        self.phase = nn.Parameter(torch.randn(3, dtype=torch.float64))
        self.last = nn.Linear(3, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        waves = self.mix(torch.tanh(self.first(x)).cdouble()) * self.scale
        waves = waves * torch.exp(1j * self.phase)
        return self.last(waves.abs() + 0.3 * waves.real)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Waves()


X = torch.randn(N, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.arange(N) % 2
DATA, TEST = TensorDataset(X, Y), (X[:M] + 0.5, Y[:M])


def pairs(value: Tensor) -> Tensor:
    return torch.view_as_real(value) if value.is_complex() else value


def rows(model: nn.Module, x: Tensor, y: Tensor, loss: Any = LOSS) -> Tensor:
    """The gradient of each example alone, real and imaginary parts side by side."""
    found = []
    for i in range(len(x)):
        value = loss(model(x[i : i + 1]), y[i : i + 1])
        gradients = torch.autograd.grad(value, list(model.parameters()))
        found.append(torch.cat([pairs(gradient).reshape(-1) for gradient in gradients]))
    return torch.stack(found)


def function_of_pairs(model: nn.Module) -> tuple[Any, Tensor]:
    """The model's outputs as a function of real numbers, and where it stands."""
    named = dict(model.named_parameters())
    sizes = {name: pairs(p).shape for name, p in named.items()}

    def outputs(flat: Tensor) -> Tensor:
        parts = flat.split([size.numel() for size in sizes.values()])
        values = {
            name: torch.view_as_complex(part.reshape(size))
            if named[name].is_complex()
            else part.reshape(size)
            for (name, size), part in zip(sizes.items(), parts, strict=True)
        }
        return functional_call(model, values, (X,))

    return outputs, torch.cat([pairs(p.detach()).reshape(-1) for p in named.values()])


def gauss_newton(model: nn.Module) -> Tensor:
    outputs, at = function_of_pairs(model)
    jacobian = torch.autograd.functional.jacobian(outputs, at)
    p = torch.softmax(model(X), 1).detach()
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return torch.einsum("ncp,ncd,ndq->pq", jacobian, curvature, jacobian) / N


def hessian(model: nn.Module) -> Tensor:
    outputs, at = function_of_pairs(model)
    return torch.autograd.functional.hessian(lambda flat: LOSS(outputs(flat), Y), at)


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    assert found.dtype == torch.float64
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


def make(method: Any, model: nn.Module, **kwargs: Any) -> Any:
    states: Any = [model.state_dict()]
    if method is NaiveInfluenceFunction:
        states = model.state_dict()
    return method(model, DATA, states, loss_fn=LOSS, batch_size=4, **kwargs)


def test_gradients(model: nn.Module) -> None:
    train, test = rows(model, X, Y), rows(model, *TEST)
    assert_close(make(GradDot, model).influence(TEST), test @ train.T)
    assert_close(make(GradDot, model).self_influence(), train.square().sum(1))
    units = [side / side.norm(dim=1, keepdim=True) for side in (test, train)]
    assert_close(make(GradCos, model).influence(TEST), units[0] @ units[1].T)
    layers = make(GradDot, model).influence_by_layer(TEST)
    assert sorted(layers) == ["first", "last", "mix", "phase", "scale"]
    assert_close(sum(layers.values(), torch.zeros(())), test @ train.T)
    whole = make(TracInCPRandProj, model, projection="identity").influence(TEST)
    assert_close(whole, test @ train.T)
    of_mix = TracInCPFast(model, "mix", DATA, [model.state_dict()], loss_fn=LOSS)
    assert_close(of_mix.influence(TEST), layers["mix"])


def test_single_precision(model: nn.Module) -> None:
    torch.manual_seed(0)
    single = nn.Linear(4, 2, dtype=torch.cfloat)

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs.abs(), labels, reduction="none")

    x = X.cfloat()
    dot = GradDot(single, TensorDataset(x, Y), [single.state_dict()], loss_fn=loss)
    own = rows(single, x, Y, lambda outputs, labels: loss(outputs, labels).sum())
    found = dot.influence((x, Y))
    assert found.dtype == torch.float32
    assert torch.allclose(found, own @ own.T, 1e-4, 1e-5)


SOLVERS = [
    (ExplicitInfluenceFunction, {}),
    (CGInfluenceFunction, {"tol": 1e-12}),
    (LiSSAInfluenceFunction, {"hessian_batch_size": None, "recursion_depth": 3000}),
    (NystromInfluenceFunction, {"rank": 100}),
]


@pytest.mark.parametrize(("method", "kwargs"), SOLVERS)
def test_gauss_newton(model: nn.Module, method: Any, kwargs: dict[str, Any]) -> None:
    damped = gauss_newton(model)
    damped.diagonal().add_(0.1)
    expected = rows(model, *TEST) @ torch.linalg.solve(damped, rows(model, X, Y).T)
    found = make(method, model, damping=0.1, **kwargs).influence(TEST)
    assert_close(found, expected, 1e-8)


def test_hessian(model: nn.Module) -> None:
    train, test, own = rows(model, X, Y), rows(model, *TEST), hessian(model)
    eye = torch.eye(len(own), dtype=torch.float64)
    exact = make(ExplicitInfluenceFunction, model, curvature="hessian", damping=2.0)
    assert_close(exact.influence(TEST), test @ torch.linalg.solve(own + 2 * eye, train.T))
    naive = make(NaiveInfluenceFunction, model, projection_dim=None, hessian_reg=30.0)
    expected = test @ torch.linalg.solve(N * own + 30 * eye, train.T)
    assert_close(naive.influence(TEST), expected, 1e-8)


def test_outer_products(model: nn.Module) -> None:
    train, test = rows(model, X, Y), rows(model, *TEST)
    fisher = train.T @ train / N + 0.1 * torch.eye(train.shape[1], dtype=torch.float64)
    expected = test @ torch.linalg.solve(fisher, train.T)
    exact = make(
        ExplicitInfluenceFunction, model, curvature="empirical_fisher", damping=0.1
    ).influence(TEST)
    assert_close(exact, expected)
    dims = {"projection_dim": 10**6, "projection": "identity", "blocks": "full"}
    assert_close(make(LoGra, model, damping=0.1, **dims).influence(TEST), expected)


def test_datainf_of_one_layer(model: nn.Module) -> None:
    names = [name for name, _ in model.named_parameters()]
    sizes = [pairs(p).numel() for p in model.parameters()]
    chosen = torch.cat(
        [
            torch.full((size,), name.startswith("mix"))
            for name, size in zip(names, sizes, strict=True)
        ]
    )
    train, test = rows(model, X, Y)[:, chosen], rows(model, *TEST)[:, chosen]
    eye = torch.eye(train.shape[1], dtype=torch.float64)
    mean = sum(torch.linalg.inv(torch.outer(g, g) + 0.1 * eye) for g in train) / N
    found = make(DataInf, model, layers=["mix"], damping=0.1).influence(TEST)
    assert_close(found, test @ mean @ train.T)


def test_kronecker_factors_leave_them_the_diagonal(model: nn.Module) -> None:
    """Of real and imaginary parts, each a number of its own."""
    parts = [
        torch.full((pairs(p).numel(),), name.startswith("mix"))
        for name, p in model.named_parameters()
    ]
    chosen = torch.cat(parts)
    train, test = rows(model, X, Y)[:, chosen], rows(model, *TEST)[:, chosen]
    diagonal = train.square().mean(0) + 1e-3
    own: dict[str, Any] = {"curvature": "empirical_fisher", "damping": 1e-3, "layers": ["mix"]}
    found = make(EKFACInfluenceFunction, model, **own)
    assert_close(found.influence(TEST), (test / diagonal) @ train.T)
    assert found.block_forms == {"mix": "diagonal"}
    assert_close(found.self_influence(), (train.square() / diagonal).sum(1))


@pytest.mark.filterwarnings("ignore:.*have features of")
def test_trak(model: nn.Module) -> None:
    def margin(outputs: Tensor, labels: Tensor) -> Tensor:
        p = torch.softmax(outputs, 1)[0, labels]
        return torch.log(p / (1 - p)).sum()

    train, test = rows(model, X, Y, margin), rows(model, *TEST, margin)
    gram = train.T @ train + 0.1 * torch.eye(train.shape[1], dtype=torch.float64)
    wrong = 1 - torch.softmax(model(X), 1).detach()[torch.arange(N), Y]
    trak = influence_kit.TRAK(
        model, DATA, [model.state_dict()], projection="identity", projection_dim=1, ridge=0.1
    )
    assert_close(trak.influence(TEST), test @ torch.linalg.solve(gram, train.T) * wrong)


@pytest.mark.parametrize("name", ["TRAK", "LoGra", "GraSS", "FactGraSS", "TracInCPRandProj"])
def test_random_projections_are_unbiased(model: nn.Module, name: str) -> None:
    """Only that they run, in real numbers: their maps are of pairs."""
    kwargs = {} if name == "TRAK" else {"loss_fn": LOSS}
    method = getattr(influence_kit, name)
    found = method(model, DATA, [model.state_dict()], projection_dim=9, **kwargs).influence(TEST)
    assert found.shape == (M, N)
    assert found.dtype == torch.float64
    assert bool(torch.isfinite(found).all())


def test_perturbations(model: nn.Module) -> None:
    damped = gauss_newton(model)
    damped.diagonal().add_(0.1)
    solved = torch.linalg.solve(damped, rows(model, *TEST).T).T
    step, expected = 1e-5, torch.zeros(M, N, 4).double()
    for j in range(4):
        shift = torch.zeros(4, dtype=torch.float64)
        shift[j] = step
        change = rows(model, X + shift, Y) - rows(model, X - shift, Y)
        expected[:, :, j] = solved @ change.T / (2 * step)
    exact = make(ExplicitInfluenceFunction, model, damping=0.1)
    assert_close(exact.perturbation_influence(TEST), expected, 1e-7)


def test_embeddings_of_a_last_step() -> None:
    torch.manual_seed(0)
    model, rate = Waves(), 0.05
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    with TrainingTrace(model, optimizer) as trace:
        before = rows(model, X, Y)
        optimizer.zero_grad()
        LOSS(model(X), Y).backward()
        trace.record(torch.arange(N))
        optimizer.step()
    found = DVEmb(model, DATA, trace=trace, loss_fn=LOSS).influence(TEST)
    assert_close(found, rate / N * rows(model, *TEST) @ before.T)


def test_weights_that_differ_in_their_imaginary_part_are_two_checkpoints(model: nn.Module) -> None:
    first = {name: value.clone() for name, value in model.state_dict().items()}
    second = {**first, "scale": first["scale"] + 1j}
    dot = GradDot(model, DATA, [first, second], loss_fn=LOSS)
    assert dot.influence(TEST).shape == (M, N)  # no warning of equal weights, which is an error


def test_what_takes_no_complex_parameters_says_so(model: nn.Module, tmp_path: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="'mix' has complex parameters, which the refit"):
        RepresenterPointSelection(model, "mix", DATA, [model.state_dict()], loss_fn=LOSS)
    with pytest.raises(InvalidArgumentError, match=r"'mix' returns torch.complex128, and activ"):
        KNNShapley(model, DATA, [model.state_dict()], layer="mix").influence(TEST)
    with pytest.raises(InvalidArgumentError, match=r"'mix' returns torch.complex128, and activ"):
        SimilarityInfluence(model, "mix", DATA, tmp_path).influence(X)


def test_complex_outputs() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 2, dtype=torch.cdouble)
    x, y = X.cdouble(), torch.randn(N, 2, dtype=torch.cdouble)
    data, states = TensorDataset(x, y), [model.state_dict()]

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).abs().square().sum(1)

    own = rows(model, x, y, lambda outputs, targets: loss(outputs, targets).sum())
    exact = ExplicitInfluenceFunction(model, data, states, loss_fn=loss, damping=0.1)
    design = torch.cat([x, torch.ones(N, 1).cdouble()], dim=1)
    # the mean of 2 |W a|^2 over the examples, of pairs
    jacobians = []
    for a in design:
        real = torch.stack([torch.stack([a.real, -a.imag], 1), torch.stack([a.imag, a.real], 1)])
        jacobians.append(real)
    curvature = sum(2 * j.flatten(1).T @ j.flatten(1) for j in jacobians) / N
    whole = torch.zeros(20, 20, dtype=torch.float64)
    order = [
        [*range(8 * k, 8 * k + 8), 16 + 2 * k, 17 + 2 * k] for k in range(2)
    ]  # of an output its weights, and its bias
    for places in order:
        whole[torch.tensor(places)[:, None], torch.tensor(places)] = curvature
    whole.diagonal().add_(0.1)
    assert_close(exact.influence((x, y)), own @ torch.linalg.solve(whole, own.T))
    fisher = ExplicitInfluenceFunction(model, data, states, loss_fn=loss, curvature="fisher")
    with pytest.raises(InvalidArgumentError, match="the outputs are complex"):
        fisher.influence((x, y))
    trak = influence_kit.TRAK(model, TensorDataset(x, Y), states, projection_dim=4)
    with pytest.raises(
        InvalidArgumentError, match=r"outputs are torch.complex128, for which there"
    ):
        trak.influence((x, Y))


def test_a_complex_loss_is_refused() -> None:
    model = nn.Linear(4, 2, dtype=torch.cdouble)
    data = TensorDataset(X.cdouble(), Y)
    dot = GradDot(model, data, [model.state_dict()], loss_fn=lambda o, t: (o * o).sum(1))
    with pytest.raises(InvalidArgumentError, match=r"returned torch.complex128, but a loss"):
        dot.influence((X.cdouble(), Y))
