"""Kronecker-factored curvature of layers, and the grid of its inverse, against dense matrices."""

from typing import Any

import influence_oracles as dense
import oracles
import pytest
import slope_oracle
import torch
from cases import CASES, Examples, cross_entropy
from contract import assert_close, build
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import influence_kit
from influence_kit import EKFACInfluenceFunction
from influence_kit.curvature import eigenbasis
from influence_kit.curvature.eigenbasis import Eigenbasis
from influence_kit.curvature.kronecker import MatrixLayer
from influence_kit.errors import InvalidArgumentError

N, M, DAMPING = 12, 4, 0.02
MATRICES = {
    "KFACInfluenceFunction": dense.kfac_matrix,
    "EKFACInfluenceFunction": dense.ekfac_matrix,
}
both = pytest.mark.parametrize("method", MATRICES)


def explain(method: str, model: nn.Module, train: Any, **arguments: Any) -> Any:
    defaults = {
        "loss_fn": cross_entropy,
        "damping": DAMPING,
        "curvature": "empirical_fisher",
        "batch_size": 5,
        "rtol": 0.0,
    }
    make = getattr(influence_kit, method)
    return make(model, Examples(train), [model.state_dict()], **defaults | arguments)


def expected(method: str, model: nn.Module, train: Any, test: Any, layers: list[str]) -> Tensor:
    matrix = dense.kronecker_curvature(model, train, cross_entropy, layers, MATRICES[method])
    blocks = {
        name: [f"{name}.{own}" for own, _ in model.get_submodule(name).named_parameters()]
        for name in layers
    }
    inverse = dense.block_inverse(model, matrix, blocks, DAMPING)
    h, g = (oracles.gradients(model, batch, cross_entropy) for batch in (test, train))
    return dense.scores(inverse, h, g)


def images(n: int, seed: int, channels: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, channels, 5, 5, generator=generator).double(),
        torch.arange(n) % 3,
    )


def vectors(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=generator).double(), torch.arange(n) % 3


# Kinds of layers.


def plain_layers(bias: bool) -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 5, bias=bias), nn.Tanh(), nn.Linear(5, 3, bias=bias), nn.Flatten()
    )


def convolutions(bias: bool) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 3, 3, stride=2, padding=1, bias=bias),
        nn.Tanh(),
        nn.Conv2d(3, 2, 2, bias=bias),
        nn.Flatten(),
        nn.Linear(8, 3, bias=bias),
    )


@both
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("build", [plain_layers, convolutions])
def test_layers_with_and_without_bias(method: str, bias: bool, build: Any) -> None:
    torch.manual_seed(0)
    model, data = build(bias).double(), vectors if build is plain_layers else images
    train, test = data(N, 0), data(M, 1)
    layers = ["0", "2"] if build is plain_layers else ["0", "2", "4"]
    found = explain(method, model, train)
    assert found.block_names == layers
    assert_close(found.influence(test), expected(method, model, train, test, layers), 1e-8)


class Parallel(nn.Module):
    """What a grouped convolution is: one for each group of channels, side by side."""

    def __init__(self, grouped: nn.Conv2d) -> None:
        super().__init__()
        g = grouped.groups
        weights = grouped.weight.detach().chunk(g)
        biases = [None] * g if grouped.bias is None else grouped.bias.detach().chunk(g)
        self.parts = nn.ModuleList()
        for weight, bias in zip(weights, biases, strict=True):
            part = nn.Conv2d(
                weight.shape[1], weight.shape[0], 3, padding=grouped.padding, bias=bias is not None
            ).double()
            part.weight.data = weight.clone()
            if bias is not None:
                part.bias.data = bias.clone()
            self.parts.append(part)

    def forward(self, x: Tensor) -> Tensor:
        pieces = zip(self.parts, x.chunk(len(self.parts), dim=1), strict=True)
        return torch.cat([part(piece) for part, piece in pieces], dim=1)


@both
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("groups", "outputs"), [(2, 6), (4, 4), (4, 8)])
def test_groups_of_a_convolution_are_layers_of_their_own(
    method: str, bias: bool, groups: int, outputs: int
) -> None:
    """(4, 4) and (4, 8) are depthwise."""
    torch.manual_seed(0)
    grouped = nn.Conv2d(4, outputs, 3, padding=1, groups=groups, bias=bias).double()
    rest = nn.Sequential(nn.Tanh(), nn.Flatten(), nn.Linear(25 * outputs, 3)).double()
    train, test = images(N, 0), images(M, 1)
    model = nn.Sequential(grouped, *rest)
    apart = nn.Sequential(Parallel(grouped), *rest)
    layers = [f"0.parts.{group}" for group in range(groups)]
    found = explain(method, model, train, layers=["0"])
    assert found.block_names == ["0"]
    parts = explain(method, apart, train, layers=layers)
    assert_close(found.influence(test), parts.influence(test), 1e-8)
    assert_close(parts.influence(test), expected(method, apart, train, test, layers), 1e-8)


class Transposed(nn.Module):
    """Hugging Face's Conv1D beside the linear layer that it is."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.first, self.head = make(5, 4), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x).tanh()).mean(1)


@both
@pytest.mark.parametrize("positions", [1, 3])
def test_a_transposed_linear_layer(method: str, positions: int) -> None:
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = Transposed(lambda outputs, inputs: Conv1D(outputs, inputs)).double()
    model.first.bias.data.normal_()
    plain = Transposed(lambda outputs, inputs: nn.Linear(inputs, outputs)).double()
    plain.head = model.head
    plain.first.weight.data = model.first.weight.data.T.clone()
    plain.first.bias.data = model.first.bias.data.clone()
    (x, y), (a, b) = vectors(N * positions, 0), vectors(M * positions, 1)
    train = (x.view(N, positions, 4), y[:N])
    test = (a.view(M, positions, 4), b[:M])
    found = explain(method, model, train)
    other = explain(method, plain, train)
    assert_close(found.influence(test), other.influence(test), 1e-8)
    expected_scores = expected(method, plain, train, test, ["first", "head"])
    assert_close(other.influence(test), expected_scores, 1e-8)
    # its quantities are in the shape of its own weight
    vectors_of = found.compute_intermediate_quantities(test)
    assert_close(found.influence(vectors_of), found.influence(test), 1e-8)


class Bag(nn.Module):
    """An embedding whose rows some examples look up twice, and some ids never."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(7, 4), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.words(ids).mean(1).tanh())


@both
@pytest.mark.parametrize("aggregate", [False, True])
def test_an_embedding(method: str, aggregate: bool) -> None:
    torch.manual_seed(0)
    model = Bag().double()
    train = (torch.randint(0, 6, (N, 3)), torch.arange(N) % 3)
    test = (torch.randint(0, 7, (M, 3)), torch.arange(M) % 3)
    scores = expected(method, model, train, test, ["words", "head"])
    found = explain(method, model, train).influence(test, aggregate=aggregate)
    assert_close(found, scores.sum(0, keepdim=True) if aggregate else scores, 1e-8)


@both
def test_aggregated_tests_are_their_sum(method: str) -> None:
    torch.manual_seed(0)
    model, train, test = convolutions(True).double(), images(N, 0), images(M, 1)
    explainer = explain(method, model, train)
    found = explainer.influence(test, aggregate=True)
    assert_close(found, explainer.influence(test).sum(0, keepdim=True))


@both
@pytest.mark.parametrize("curvature", ["fisher", "empirical_fisher"])
def test_a_model_that_is_one_layer(method: str, curvature: str) -> None:
    """Logistic regression: weight and bias are one layer here, too."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    train, test = vectors(N, 0), vectors(M, 1)
    inside = nn.Sequential(model)
    found = explain(method, model, train, curvature=curvature).influence(test)
    assert_close(found, explain(method, inside, train, curvature=curvature).influence(test))


# The grid of the inverse, and a cheaper form of it.

O, I, LARGE = 96, 80, 200  # noqa: E741 - outputs and inputs of a layer


def grid_basis(rtol: float, spectrum: float = 4.0, damping: float = 0.01) -> Eigenbasis:
    """A K-FAC grid 1 / (s a + damping) of eigenvalues over some orders of magnitude."""
    sizes = [torch.logspace(0, -spectrum, size, dtype=torch.float64)[None] for size in (O, I)]
    weights = 1 / (sizes[0][:, :, None] * sizes[1][:, None, :] + damping)
    eye = [torch.eye(size).double()[None] for size in (O, I)]
    layer = MatrixLayer("0.weight", None, 1, False, O, I)
    return Eigenbasis(layer, *eye, weights, (sizes[0], sizes[1]), rtol)


@pytest.mark.parametrize("rtol", [1e-2, 1e-4, 1e-6])
def test_the_shared_vectors_approach_the_grid_where_it_counts(rtol: float) -> None:
    basis = grid_basis(rtol)
    assert basis.shared is not None
    u, v, rest = basis.shared.left, basis.shared.right, basis.shared.rest
    assert len(u) < O * I / (O + I) / 2
    assert_close(u.T @ v + rest, basis.weights[0])
    s, a = (size[0] for size in basis.sizes)
    error, exact = (part * s[:, None] * a for part in (rest, basis.weights[0]))
    assert error.norm() <= 0.1 * rtol * exact.norm() * 1.0001


def test_a_smaller_rtol_takes_more_vectors() -> None:
    ranks = [len(grid_basis(rtol).shared.left) for rtol in (1e-1, 1e-3, 1e-5)]  # type: ignore[union-attr]
    assert ranks[0] < ranks[1] < ranks[2]


def test_there_are_no_shared_vectors_where_they_would_be_too_many() -> None:
    assert grid_basis(0.0).shared is None
    basis = grid_basis(1e-5)
    generator = torch.Generator().manual_seed(0)
    rough = torch.rand(1, O, I, generator=generator, dtype=torch.float64)
    assert Eigenbasis(basis.layer, basis.left, basis.right, rough, basis.sizes, 1e-5).shared is None
    zero = (basis.sizes[0], torch.zeros_like(basis.sizes[1]))
    assert (
        Eigenbasis(basis.layer, basis.left, basis.right, basis.weights, zero, 1e-5).shared is None
    )


def wide(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(I, O), nn.Tanh(), nn.Linear(O, 3)).double()


def wide_data(n: int, seed: int, decay: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, I, generator=generator).double()
    return x * torch.logspace(0, -decay, I, dtype=torch.float64), torch.arange(n) % 3


class Watched:
    """Whether the cheaper form was taken."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.taken: list[bool] = []
        method = eigenbasis.Preconditioned._meet_shared

        def watched(form: Any, train: Any) -> Any:
            found = method(form, train)
            self.taken.append(found is not None)
            return found

        monkeypatch.setattr(eigenbasis.Preconditioned, "_meet_shared", watched)


def wide_scores(rtol: float, test: Any, train: Any = None, decay: float = 2.0) -> Tensor:
    model, hessian = wide(), wide_data(LARGE, 0, decay)
    train = hessian if train is None else train
    return influence_kit.KFACInfluenceFunction(
        model,
        TensorDataset(*train),
        [model.state_dict()],
        loss_fn=cross_entropy,
        layers=["0"],
        hessian_dataset=TensorDataset(*hessian),
        curvature="empirical_fisher",
        damping="mean",
        rtol=rtol,
        batch_size=100,
    ).influence(test)


@pytest.mark.parametrize("rtol", [1e-2, 1e-5])
def test_the_cheaper_form_errs_less_than_rtol(rtol: float, monkeypatch: Any) -> None:
    test = wide_data(150, 1)
    exact = wide_scores(0.0, test)
    watched = Watched(monkeypatch)
    found = wide_scores(rtol, test)
    assert watched.taken == [True, True]
    assert not torch.allclose(found, exact, rtol=1e-12)
    assert (found - exact).norm() <= rtol * exact.norm()


def test_without_rtol_products_are_exact(monkeypatch: Any) -> None:
    test, watched = wide_data(150, 1), Watched(monkeypatch)
    found = wide_scores(0.0, test)
    assert watched.taken
    assert not any(watched.taken)
    model, train = wide(), wide_data(LARGE, 0)
    g, h = (
        oracles.gradients(model, batch, cross_entropy, ["0.weight", "0.bias"])
        for batch in (train, test)
    )
    seen = dense.record(model, model[0], train, cross_entropy)
    s, q = torch.linalg.eigh(seen.delta_factor)
    a, r = torch.linalg.eigh(seen.input_factor)
    grid = s.clamp(min=0)[:, None] * a.clamp(min=0)
    weights = 1 / (grid + 0.1 * grid.mean())
    joined = [torch.cat([x[:, : O * I].view(-1, O, I), x[:, O * I :, None]], dim=2) for x in (g, h)]
    one, other = (q.T @ x @ r for x in joined)
    assert_close(found, (other * weights).flatten(1) @ one.flatten(1).T, 1e-8)


def unlike(n: int, seed: int, usual: Tensor) -> tuple[Tensor, Tensor]:
    """Examples along the directions that the Hessian data hardly has, but for some usual ones."""
    x, y = wide_data(n, seed, 6.0)
    odd = torch.zeros_like(x)
    odd[:, -20:] = torch.randn(n, 20, generator=torch.Generator().manual_seed(seed)).double()
    return torch.where(usual[:, None], x, odd), y


@pytest.mark.parametrize("usual", [[], range(0, 100, 2), range(16)], ids=["none", "half", "first"])
def test_examples_unlike_the_hessian_data_fall_back_to_exact_products(
    usual: Any, monkeypatch: Any
) -> None:
    """Also those that do not stand first in their batch."""
    train = unlike(200, 3, torch.isin(torch.arange(200) % 100, torch.tensor(list(usual)).int()))
    # of the second batch all are usual
    train = tuple(torch.cat([t[:100], u[100:]]) for t, u in zip(train, wide_data(200, 2, 6.0)))  # noqa: B905
    test = unlike(150, 1, torch.arange(150) % 2 == 0)
    exact = wide_scores(0.0, test, train, decay=6.0)
    watched = Watched(monkeypatch)
    found = wide_scores(1e-5, test, train, decay=6.0)
    assert (found - exact).norm() <= 1e-5 * exact.norm()
    assert watched.taken == [False, True]


@pytest.mark.parametrize("rtol", [0.0, 1e-3])
def test_self_influence_is_the_diagonal_of_wide_layers(rtol: float) -> None:
    model, train = wide(), wide_data(LARGE, 0)
    explainer = EKFACInfluenceFunction(
        model,
        TensorDataset(*train),
        [model.state_dict()],
        loss_fn=cross_entropy,
        layers=["0"],
        curvature="empirical_fisher",
        rtol=rtol,
    )
    diagonal = explainer.influence(train).diagonal()
    assert_close(explainer.self_influence(), diagonal, max(rtol, 1e-9))


@pytest.mark.parametrize("rtol", [-1e-3, 1.0, float("nan")])
def test_an_rtol_that_cannot_be_meant(rtol: float) -> None:
    model = wide()
    with pytest.raises(InvalidArgumentError, match=r"`rtol` must be .* not negative and below 1"):
        explain("EKFACInfluenceFunction", model, wide_data(5, 0), rtol=rtol)


def test_a_curvature_without_outer_products_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match='must be "fisher" or "empirical_fisher"; got'):
        explain("KFACInfluenceFunction", wide(), wide_data(5, 0), curvature="ggn")


def test_eigenvalues_are_measured_at_slopes_that_the_eigenvectors_did_not_see() -> None:
    """Each basis diagonalises the covariances at the first draw; Lambda is of the second."""
    case = CASES["mlp"]
    ekfac = build("EKFACInfluenceFunction", case, curvature="fisher", seed=7)
    ekfac.checkpoints = [case.states[0]]
    ekfac.fit()
    model = case.model()
    model.load_state_dict(case.states[0])
    seeds = slope_oracle.seeds(7)[:2]
    first, second = (slope_oracle.with_slopes(model, case.train, seed) for seed in seeds)
    assert not torch.equal(first[1], second[1])
    facts = ekfac.fit_state[0]
    for layer in ("body.0", "body.2", "head"):
        left, right = facts[f"{layer}.left"][0], facts[f"{layer}.right"][0]

        def rotated(batch: Any, layer: str, *bases: Tensor) -> Tensor:
            names = [f"{layer}.weight", f"{layer}.bias"]
            flat = [oracles.gradients(model, batch, slope_oracle.products, [n]) for n in names]
            matrix = flat[0].view(len(flat[0]), flat[1].shape[1], -1)
            joined = torch.cat([matrix, flat[1].unsqueeze(-1)], dim=2)
            return bases[0].T @ joined @ bases[1]

        grid = rotated(second, layer, left, right).square().mean(0)
        assert_close(facts[f"{layer}.grid"].view_as(grid), grid)
        # of a layer with one position the bias column is the output gradient
        deltas = oracles.gradients(model, first, slope_oracle.products, [f"{layer}.bias"])
        covariance = left.T @ deltas.T @ deltas @ left
        off = covariance - covariance.diagonal().diag()
        assert off.abs().max() < 1e-10 * covariance.abs().max()
