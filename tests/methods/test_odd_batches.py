"""Models and batches that show their kind late, or in their order alone, for every family.

Gradients are compared with autograd on one example at a time; the other families with what they
give for batches of one example, where nothing can be mixed or reordered.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from contract import assert_close
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from influence_kit import (
    TRAK,
    CGInfluenceFunction,
    EKFACInfluenceFunction,
    GradCos,
    KNNShapley,
    LoGra,
    TracInCP,
)
from influence_kit.errors import InvalidArgumentError

N = 12
SLOW = pytest.mark.filterwarnings("ignore:.*(slower|one example at a time).*:UserWarning")
pytestmark = SLOW


class Batches:
    """Batches of given sizes, in order; ``take`` cuts them out of the whole data."""

    def __init__(self, cut: Any, sizes: tuple[int, ...]) -> None:
        ends = torch.tensor(sizes).cumsum(0).tolist()
        starts = [end - size for end, size in zip(ends, sizes, strict=True)]
        self.batches = [cut(slice(a, b)) for a, b in zip(starts, ends, strict=True)]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class Sorting(nn.Module):
    """Sorts its examples, and puts their outputs back in order."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        return self.head(torch.tanh(self.body(x[order])))[order.argsort()]


class Halves(nn.Module):
    """Runs two views of each example through one encoder, stacked in one batch."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(5, 6), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.tanh(self.body(torch.cat([x, x.flip(1)]))).chunk(2)
        return self.head(torch.cat([a, b], 1))


class Moving(nn.Module):
    """A weight that is also used outside its layer, from a batch of which one example asks it."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(x))
        late = (x[:, 1:2] > 1.0).to(x) * F.linear(x, self.body.weight)
        return self.head(hidden + late)


class TimeFirst(nn.Module):
    """A recurrent network of ``[t, n, d]``."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.GRU(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[0][-1])


def _vectors(first_sorted: int = 0) -> Tensor:
    torch.manual_seed(1)
    x = torch.randn(N, 5, dtype=torch.float64)
    x[:first_sorted] = x[:first_sorted][x[:first_sorted, 0].argsort()]
    x[:8, 1] = x[:8, 1].clamp(max=0.9)
    x[8:, 1] += 2
    return x


Y = torch.arange(N) % 3
STEPS = torch.randn(5, N, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def _zero_head(model: nn.Module) -> list[dict[str, Tensor]]:
    """Two checkpoints, of which the first lets no gradient through its head."""
    whole = {key: value.clone() for key, value in model.state_dict().items()}
    return [{**whole, "head.weight": torch.zeros_like(whole["head.weight"])}, whole]


KINDS = {
    "sorted within": (Sorting, lambda rows: (_vectors(7)[rows], Y[rows]), (7, 5)),
    "halves": (Halves, lambda rows: (_vectors()[rows], Y[rows]), (5, 5, 2)),
    "a late use": (Moving, lambda rows: (_vectors()[rows], Y[rows]), (4, 4, 4)),
    "as many steps as examples, late": (
        TimeFirst,
        lambda rows: (STEPS[:, rows], Y[rows]),
        (4, 5, 3),
    ),
    "as many steps as examples, first": (
        TimeFirst,
        lambda rows: (STEPS[:, rows], Y[rows]),
        (5, 4, 3),
    ),
}
LOSS = nn.CrossEntropyLoss()


def setting(kind: str) -> tuple[nn.Module, Any, tuple[int, ...], list[dict[str, Tensor]]]:
    build, cut, sizes = KINDS[kind]
    torch.manual_seed(0)
    model = build().double()
    return model, cut, sizes, _zero_head(model)


def alone(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The gradient of a batch of one example."""
    total = LOSS(model(x), y)
    return torch.cat([g.flatten() for g in torch.autograd.grad(total, list(model.parameters()))])


class SortingByLength(nn.Module):
    """Runs the longest examples first, and puts its outputs back."""

    def __init__(self) -> None:
        super().__init__()
        self.ids, self.body, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        order = (x > 0).sum(1).argsort(descending=True, stable=True)
        hidden = torch.tanh(self.body(self.ids(x[order]))) * (x > 0)[order][..., None]
        return self.head(hidden.sum(1)[order.argsort()])


@pytest.mark.parametrize("seed", range(8))
def test_one_batch_of_which_few_examples_are_shorter(seed: int) -> None:
    # the few that are checked first are of one length, most likely, and stay in their order
    torch.manual_seed(seed)
    model, x, y = SortingByLength().double(), torch.randint(1, 9, (64, 6)), torch.arange(64) % 3
    x[torch.randint(0, 60, (3,)), 3:] = 0
    g = torch.stack([alone(model, x[i : i + 1], y[i : i + 1]) for i in range(64)])
    influence = TracInCP(model, TensorDataset(x, y), [model.state_dict()], loss_fn=LOSS)
    assert_close(influence.influence((x[:4], y[:4])), g[:4] @ g.T, 1e-9)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_three_examples_in_any_order(order: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, x, y = Sorting().double(), _vectors()[list(order)], torch.arange(3)
    g = torch.stack([alone(model, x[i : i + 1], y[i : i + 1]) for i in range(3)])
    influence = TracInCP(model, TensorDataset(x, y), [model.state_dict()], loss_fn=LOSS)
    assert_close(influence.self_influence(), g.square().sum(1), 1e-9)


every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
@pytest.mark.parametrize("method", [TracInCP, GradCos])
def test_gradients(kind: str, method: type) -> None:
    model, cut, sizes, states = setting(kind)
    influence = method(model, Batches(cut, sizes), states, loss_fn=LOSS)
    expected = torch.zeros(5, N, dtype=torch.float64)
    own = torch.zeros(N, dtype=torch.float64)
    for state in states:
        model.load_state_dict(state)
        g = torch.stack([alone(model, *cut(slice(i, i + 1))) for i in range(N)])
        if method is GradCos:
            g = g / g.norm(dim=1, keepdim=True)
        expected += g[:5] @ g.T
        own += g.square().sum(1)
    assert_close(influence.influence(cut(slice(0, 5))), expected, 1e-9)
    assert_close(influence.self_influence(), own, 1e-9)


@every_kind
@pytest.mark.parametrize("method", [EKFACInfluenceFunction, CGInfluenceFunction, LoGra, TRAK])
def test_curvature_and_projections(kind: str, method: type) -> None:
    def scores(sizes: tuple[int, ...]) -> Tensor:
        model, cut, _, states = setting(kind)
        own: dict[str, Any] = {"loss_fn": LOSS}
        if method is TRAK:
            own = {"projection_dim": 8}
        if method is CGInfluenceFunction:
            own |= {"damping": 0.1, "tol": 1e-12, "max_iter": 500}
        if method is EKFACInfluenceFunction:
            own |= {"curvature": "empirical_fisher", "damping": 1e-3, "layers": ["head"]}
        influence = method(model, Batches(cut, sizes), states[1:], **own)
        return influence.influence(Batches(cut, (5,)))

    if (method, kind) == (EKFACInfluenceFunction, "sorted within"):
        # which needs the inputs of each example at the layer
        with pytest.raises(InvalidArgumentError, match="no Kronecker form for 1 of 1 layers"):
            scores(KINDS[kind][2])
        return
    close = 1e-6 if method is CGInfluenceFunction else 1e-9
    assert_close(scores(KINDS[kind][2]), scores((1,) * N), close)


@pytest.mark.parametrize("kind", ["sorted within", "a late use"])
def test_activations(kind: str) -> None:
    def scores(sizes: tuple[int, ...]) -> Tensor:
        model, cut, _, states = setting(kind)
        train = Batches(cut, sizes)
        influence = KNNShapley(model, train, states[1:], n_neighbors=3, layer="body")
        return influence.influence(cut(slice(0, 5)))

    assert_close(scores(KINDS[kind][2]), scores((1,) * N))
