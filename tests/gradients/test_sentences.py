"""Why a batch has no gradient per example: each cause has its own sentence. And half precision."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from contract import assert_close
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from influence_kit import (
    EKFACInfluenceFunction,
    ExplicitInfluenceFunction,
    KFACInfluenceFunction,
    TracInCP,
)
from influence_kit.errors import InvalidArgumentError

N = 12
X = torch.randn(N, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.arange(N) % 3
SLOW = pytest.mark.filterwarnings("ignore:.*(slower|earlier batches).*:UserWarning")


class Body(nn.Module):
    """Two layers, and a function of what is between them."""

    def __init__(self, between: Any = torch.tanh, outputs: int = 3) -> None:
        super().__init__()
        self.a, self.b, self.between = nn.Linear(5, 6), nn.Linear(6, outputs), between

    def forward(self, x: Tensor) -> Any:
        return self.b(self.between(self.a(x)))


def scores(model: nn.Module, loss: Any, x: Tensor = X, y: Tensor = Y, **own: Any) -> Tensor:
    data = TensorDataset(x, y)
    tracin = TracInCP(model, data, [model.state_dict()], loss_fn=loss, batch_size=4, **own)
    return tracin.influence((x[:4], y[:4]))


def noise(h: Tensor) -> Tensor:
    return torch.tanh(h) + 0.1 * torch.randn_like(h)


def centred(h: Tensor) -> Tensor:
    return torch.tanh(h) - torch.tanh(h).mean(0)


def in_batch(outputs: Tensor, targets: Tensor) -> Tensor:
    z = F.normalize(outputs, dim=1)
    return -torch.logsumexp(z @ z.T, 1)


@SLOW
@pytest.mark.parametrize(
    ("model", "loss", "y", "match"),
    [
        (Body(noise), nn.CrossEntropyLoss(), Y, "returns other outputs each time for the same"),
        (Body(centred), nn.CrossEntropyLoss(), Y, r"first at layer 'b' \(Linear\)"),
        (Body(), in_batch, Y, "the loss mixes the examples of a batch"),
        (Body(outputs=1), nn.MSELoss(), X[:, 0], r"are broadcast to \[\d, \d\]"),
        (Body(outputs=1), nn.MSELoss(reduction="none"), X[:, 0], r"targets.unsqueeze\(-1\)"),
    ],
    ids=["noise", "a layer", "the loss", "broadcast", "broadcast, per example"],
)
def test_what_mixes_is_named(model: nn.Module, loss: Any, y: Tensor, match: str) -> None:
    with pytest.raises(InvalidArgumentError, match=match):
        scores(model.double(), loss, y=y)


class Bags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.EmbeddingBag(9, 4, mode="mean"), nn.Linear(4, 3)

    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        return self.head(self.table(ids, offsets))


@SLOW
def test_bags_work_one_at_a_time_and_say_so_together() -> None:
    torch.manual_seed(0)
    model, loss = Bags().double(), nn.CrossEntropyLoss()
    bags = [(torch.randint(0, 9, (2 + i % 3,)), torch.tensor([0]), Y[i : i + 1]) for i in range(6)]
    single = DataLoader([*enumerate(bags)], batch_size=1, collate_fn=lambda items: items[0][1])
    tracin = TracInCP(model, single, [model.state_dict()], loss_fn=loss)
    rows = []
    for ids, offsets, y in bags:
        found = torch.autograd.grad(loss(model(ids, offsets), y), list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in found]))
    g = torch.stack(rows)
    assert_close(tracin.influence(bags[1]), g[1:2] @ g.T, 1e-10)
    assert_close(tracin.self_influence(), g.square().sum(1), 1e-10)
    together = (torch.tensor([1, 2, 3, 4, 5]), torch.tensor([0, 2, 3]), Y[:3])
    with pytest.raises(InvalidArgumentError, match=r"atches of one example \(batch_size=1"):
        tracin.influence(together)


def test_ids_beyond_an_embedding_are_named() -> None:
    model = nn.Sequential(nn.Embedding(9, 2), nn.Flatten(), nn.Linear(8, 3)).double()
    ids = torch.arange(4 * N).reshape(N, 4) % 9
    ids[7, 1] = 9
    with pytest.raises(InvalidArgumentError, match="the id 9, but the embedding '0' has rows 0 to"):
        scores(model, nn.CrossEntropyLoss(), x=ids)


class Wrapped(Body):
    def forward(self, x: Tensor) -> Any:
        return SimpleNamespace(logits=super().forward(x))


def test_a_loss_given_an_object_says_what_to_take() -> None:
    with pytest.raises(InvalidArgumentError, match=r"a SimpleNamespace .* use its `logits`"):
        scores(Wrapped().double(), nn.CrossEntropyLoss())


def test_a_model_without_weights_is_refused() -> None:
    model = Body().to("meta")
    tracin = TracInCP(
        model, TensorDataset(X, Y), [0], lambda *_: 1.0, loss_fn=F.cross_entropy, batch_size=4
    )
    with pytest.raises(InvalidArgumentError, match="on the device 'meta', without values"):
        tracin.influence((X[:2], Y[:2]))


def test_words_of_verify_and_batch_axes() -> None:
    with pytest.raises(InvalidArgumentError, match='must be "repeated" or "once"; got 3'):
        scores(Body().double(), nn.CrossEntropyLoss(), verify=3)
    with pytest.raises(InvalidArgumentError, match="is dimension 4 of a tensor of shape"):
        scores(Body().double(), nn.CrossEntropyLoss(), batch_axes=(4, 0))
    with pytest.raises(InvalidArgumentError, match="but a batch has another structure"):
        scores(Body().double(), nn.CrossEntropyLoss(), batch_axes=(0, 0, 0))


def test_batch_axes_may_be_said() -> None:
    model = Body().double()
    said = scores(model, nn.CrossEntropyLoss(), batch_axes=(0, 0))
    assert torch.equal(said, scores(model, nn.CrossEntropyLoss()))


# Half precision, and the reduction of single examples.


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 1.07 * super().forward(x)


@SLOW
def test_a_small_difference_is_seen_in_half_precision() -> None:
    """Of 7 percent: the rule of a linear layer does not hold, and rounding would hide it."""
    torch.manual_seed(0)
    model = nn.Sequential(Scaled(5, 6), nn.Tanh(), nn.Linear(6, 3))
    double = nn.Sequential(Scaled(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    model = model.bfloat16()
    double.load_state_dict({key: value.double() for key, value in model.state_dict().items()})
    x = X.bfloat16()
    found = scores(model, nn.CrossEntropyLoss(), x=x)
    expected = scores(double, nn.CrossEntropyLoss(), x=x.double())
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()


class Autocast(Body):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x).float()


def test_autocast_within_forward_is_no_mixing() -> None:
    torch.manual_seed(0)
    model, plain = Autocast(), Body().double()
    plain.load_state_dict(model.state_dict())
    found = scores(model, nn.CrossEntropyLoss(), x=X.float())
    expected = scores(plain, nn.CrossEntropyLoss())
    assert (found - expected).abs().max() < 0.03 * expected.abs().max()


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_batches_of_one_example_do_not_hide_what_a_loss_reduces_by(reduction: str) -> None:
    """Their gradients are joined afterwards: a mean must not be taken for a sum there."""
    torch.manual_seed(0)
    model = Body().double()

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, reduction=reduction)

    def found(size: int) -> Tensor:
        data = TensorDataset(X, Y)
        own = {"loss_fn": loss, "damping": 0.1, "batch_size": size}
        exact = EKFACInfluenceFunction(
            model, data, [model.state_dict()], curvature="empirical_fisher", **own
        )
        return exact.influence((X[:4], Y[:4]))

    assert_close(found(1), found(5), 1e-9)


class Series(nn.Module):
    """A convolution over sequences with padding."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(3, 3, 3, padding=1), nn.Linear(3, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.conv((x * mask[..., None]).transpose(1, 2)).transpose(1, 2).tanh()
        return self.head((h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def test_kfac_of_a_convolution_does_not_count_padding() -> None:
    torch.manual_seed(0)
    model, lengths = Series().double(), [2, 5, 3, 4, 2, 5, 4, 3]
    series = [torch.randn(t, 3).double() for t in lengths]

    def batch(some: range) -> tuple[Tensor, ...]:
        x = nn.utils.rnn.pad_sequence([series[i] for i in some], batch_first=True)
        mask = torch.stack([torch.arange(x.shape[1]) < lengths[i] for i in some]).double()
        return x, mask, torch.tensor([i % 2 for i in some])

    def found(size: int) -> Tensor:
        loader = DataLoader(range(8), batch_size=size, collate_fn=batch)
        kfac = KFACInfluenceFunction(
            model,
            loader,
            [model.state_dict()],
            loss_fn=nn.CrossEntropyLoss(reduction="none"),
            damping=0.1,
            curvature="empirical_fisher",
        )
        return kfac.influence(batch(range(3)))

    assert_close(found(4), found(1), 1e-9)


class InPlaceOnAView(nn.Module):
    """Changes the output of a layer in place where that is a view: of one example here."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x.transpose(0, 1))
        h += 0.5
        return self.head(h.tanh_().mean(1))


def test_a_view_that_is_changed_in_place_has_its_gradient() -> None:
    torch.manual_seed(0)
    model, loss = InPlaceOnAView().double(), nn.CrossEntropyLoss()
    x = torch.randn(4, 1, 3).double()
    tracin = TracInCP(
        model,
        DataLoader([0], batch_size=1, collate_fn=lambda _: (x, Y[1:2])),
        [model.state_dict()],
        loss_fn=loss,
    )
    found = torch.autograd.grad(loss(model(x), Y[1:2]), list(model.parameters()))
    assert_close(tracin.self_influence(), sum(g.square().sum() for g in found)[None], 1e-10)


@pytest.mark.parametrize("verify", ["repeated", "once"])
def test_a_mean_by_weights_is_refused_by_products_of_the_curvature(verify: Any) -> None:
    """On the batch that shows it, also where only the first gradients are checked."""
    model, weights = Body().double(), torch.tensor([1.0, 2.0, 5.0]).double()
    data, y = TensorDataset(X, Y.sort().values), Y.sort().values

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, weight=weights)

    exact = ExplicitInfluenceFunction(
        model, data, [model.state_dict()], loss_fn=loss, batch_size=4, damping=0.1, verify=verify
    )
    exact.influence((X[:3], y[:3]))  # batches of one class each
    mixed = ExplicitInfluenceFunction(
        model, data, [model.state_dict()], loss_fn=loss, batch_size=3, damping=0.1, verify=verify
    )
    with pytest.raises(InvalidArgumentError, match=r"begins with example 3: .* is not a mean over"):
        mixed.influence((X[:3], y[:3]))
