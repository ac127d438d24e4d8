"""Models and batches that show their kind late, or in their order alone, for every family.

Gradients are compared with autograd on one example at a time; the other families with what they
give for batches of one example, where nothing can be mixed or reordered.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import assert_close
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from influence_kit import (
    TRAK,
    CGInfluenceFunction,
    EKFACInfluenceFunction,
    GradCos,
    KNNShapley,
    LoGra,
    TracInCP,
)
from influence_kit.errors import InvalidArgumentError, PassAgain
from influence_kit.methods.restarts import starts_again

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
        # factors need the inputs of each example at the layer: there is the diagonal
        model, cut, _, states = setting(kind)
        model.load_state_dict(states[1])
        g = torch.stack([alone(model, *cut(slice(i, i + 1))) for i in range(N)])
        g = g[:, -sum(p.numel() for p in model.head.parameters()) :]
        expected = (g[:5] / (g.square().mean(0) + 1e-3)) @ g.T
        assert_close(scores(KINDS[kind][2]), expected, 1e-9)
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


class ByTheLargest(nn.Module):
    """Takes one step more for a batch in which some example is large."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.mid, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.body(x))
        for _ in range(2 if bool(x.max() > 9) else 1):
            h = torch.tanh(self.mid(h))
        return self.head(h)


@pytest.mark.parametrize("n", [2, 5])
def test_a_batch_in_which_one_example_changes_the_others_is_refused(n: int) -> None:
    torch.manual_seed(0)
    model, x, y = ByTheLargest().double(), torch.randn(12, 5).double(), torch.arange(12) % 3
    for large in range(n):  # whichever it is, together with it the others look right
        late = x.clone()
        late[large + n, 0] = 10.0
        train = Batches(lambda rows, late=late: (late[rows], y[rows]), (n, n, 12 - 2 * n))
        influence = TracInCP(model, train, [model.state_dict()], loss_fn=nn.CrossEntropyLoss())
        with pytest.raises(InvalidArgumentError, match="mixes the examples"):
            influence.influence((x[:4], y[:4]))


class UsedOutsideLate(nn.Module):
    """Uses a weight outside its layer, too, though for few examples with a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        more = torch.relu(x[:, :1] - 9) * self.body.weight[:3].sum(1)
        return self.head(torch.tanh(self.body(x))) + more


def test_a_weight_used_outside_its_layer_is_seen_while_that_has_no_gradient() -> None:
    torch.manual_seed(0)
    model, x, y = UsedOutsideLate().double(), torch.randn(12, 5).double(), torch.arange(12) % 3
    x[8, 0] = 10.0

    def scores(size: int) -> Tensor:
        train = Batches(lambda rows: (x[rows], y[rows]), (size,) * (12 // size))
        influence = TracInCP(model, train, [model.state_dict()], loss_fn=nn.CrossEntropyLoss())
        return influence.influence((x[:4], y[:4]))

    assert_close(scores(4), scores(1))


class Boxes(nn.Module):
    """A box for each image of a list."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, 4)

    def forward(self, images: list[Tensor]) -> list[Tensor]:
        return [self.head(torch.tanh(self.conv(image[None])).mean((2, 3))) for image in images]


def boxes_loss(outputs: list[Tensor], targets: list[dict[str, Tensor]]) -> Tensor:
    pairs = zip(outputs, targets, strict=True)
    return torch.stack([(o - t["boxes"]).square().mean() for o, t in pairs]).sum()


def boxes_example(boxes: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    target = {"boxes": torch.randn(boxes, 4).double(), "labels": torch.zeros(boxes).long()}
    return [torch.randn(1, 6 + boxes, 7).double()], [target]


def test_one_example_is_one_however_many_boxes_it_has() -> None:
    torch.manual_seed(0)
    model = Boxes().double()
    examples = [boxes_example(boxes) for boxes in (2, 3, 4, 3)]
    rows = []
    for example in examples:
        loss = boxes_loss(model(example[0]), example[1])
        found = torch.autograd.grad(loss, list(model.parameters()))
        rows.append(torch.cat([gradient.flatten() for gradient in found]))
    right = torch.stack(rows)
    influence = TracInCP(model, examples_of(examples), [model.state_dict()], loss_fn=boxes_loss)
    assert_close(influence.influence(examples[1]), right[1:2] @ right.T)
    assert_close(influence.influence(examples_of(examples[:2])), right[:2] @ right.T)
    two = tuple([*a, *b] for a, b in zip(*examples[:2], strict=True))
    with pytest.raises(InvalidArgumentError, match=r"a list of 2 dicts.*batch_size=1"):
        influence.influence(two)


def examples_of(examples: list[Any]) -> Any:
    return Batches(lambda rows: examples[rows.start], (1,) * len(examples))


def test_one_test_example_is_read_as_the_single_ones_of_the_loader() -> None:
    torch.manual_seed(0)
    model = Bag().double()
    data = [(torch.randn(k, 5).double(), torch.tensor(k % 3)) for k in (2, 3, 4, 3)]
    train: Any = DataLoader(data, 1, collate_fn=lambda items: items[0])
    influence = TracInCP(model, train, [model.state_dict()], loss_fn=nn.CrossEntropyLoss())
    assert_close(influence.influence(data[1]), influence.influence(train)[1:2])


class Bag(nn.Module):
    """One output for a bag of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.head(x).tanh().mean(0)
        return outputs


@pytest.mark.parametrize("method", [LoGra, EKFACInfluenceFunction])
def test_a_column_of_numbers_is_a_target_at_batch_size_1(method: Any) -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(5, 1).double(), torch.randn(6, 5).double(), torch.randn(6, 3).double()
    train = Batches(lambda rows: (x[rows], y[:, 0][rows]), (1,) * 6)

    def squares(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs[:, 0] - targets).square()

    influence = method(
        model, train, [model.state_dict()], loss_fn=squares, curvature="empirical_fisher"
    )
    assert influence.influence((x[:2], y[:2, 0])).shape == (2, 6)


@pytest.mark.parametrize("kind", ["halves", "a late use", "sorted within"])
def test_what_a_store_had_written_is_taken_away(kind: str, tmp_path: Path) -> None:
    """Where the pass that builds it starts again."""
    model, cut, sizes, states = setting(kind)
    stored = TracInCP(model, Batches(cut, sizes), states, loss_fn=LOSS, store=tmp_path)
    live = TracInCP(model, Batches(cut, sizes), states, loss_fn=LOSS)
    test = cut(slice(0, 5))
    assert_close(stored.influence(test), live.influence(test), 1e-12)
    assert_close(stored.self_influence(), live.self_influence(), 1e-12)


def test_batches_that_always_contradict_one_another_are_refused() -> None:
    class Fickle(TracInCP):
        @starts_again
        def influence(self, *args: Any, **kwargs: Any) -> Any:
            raise PassAgain("as ever")

    model, cut, sizes, states = setting("halves")
    fickle = Fickle(model, Batches(cut, sizes), states, loss_fn=LOSS)
    with pytest.raises(InvalidArgumentError, match=r"contradict one another .* \(as ever\)"):
        fickle.influence(cut(slice(0, 5)))


class UsedOutsideInOneBatch(nn.Module):
    """Uses a weight outside its layer for one batch alone, which is not one that is compared."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = self.head(torch.tanh(self.body(x)))
        return out + x @ self.body.weight[:3].T if bool((x[:, 0] > 8).all()) else out


@pytest.mark.parametrize("late", range(6))
def test_a_weight_used_outside_its_layer_in_one_batch(late: int) -> None:
    torch.manual_seed(0)
    model, x, y = UsedOutsideInOneBatch().double(), _vectors(), Y.clone()
    x[2 * late : 2 * late + 2, 0] = 9.0
    train = TensorDataset(x, y)
    influence = TracInCP(model, train, [model.state_dict()], loss_fn=LOSS, batch_size=2)
    g = torch.stack([alone(model, x[i : i + 1], y[i : i + 1]) for i in range(N)])
    assert_close(influence.self_influence(), g.square().sum(1), 1e-9)


def test_single_examples_prove_nothing_of_batches() -> None:
    """Whose layers see two views, stacked: behind a head that is zero at first, and one by one."""
    model, cut, _, states = setting("halves")
    train = Batches(cut, (1, 1, 1, 1, 8))
    influence = TracInCP(model, train, states, loss_fn=LOSS)
    expected = torch.zeros(N, dtype=torch.float64)
    for state in states:
        model.load_state_dict(state)
        g = torch.stack([alone(model, *cut(slice(i, i + 1))) for i in range(N)])
        expected += g.square().sum(1)
    assert_close(influence.self_influence(), expected, 1e-9)
