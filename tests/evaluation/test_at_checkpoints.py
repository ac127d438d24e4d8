"""Losses and logits at all checkpoints, against one example at a time."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from influence_kit import load_checkpoint
from influence_kit.errors import InvalidArgumentError, NonFiniteError
from influence_kit.evaluation import (
    checkpoint_logits,
    checkpoint_losses,
    last_loss,
    low_margin,
    mean_loss,
)

N, CLASSES = 11, 3
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(N, 4, generator=GENERATOR, dtype=torch.float64)
Y = torch.arange(N) % CLASSES
DATA, EMPTY = TensorDataset(X, Y), TensorDataset(X[:0], Y[:0])


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3))


MODEL = network().double()
RUN = [
    {"state_dict": network(seed).double().state_dict(), "learning_rate": 0.1} for seed in (1, 2, 3)
]


@torch.no_grad()
def one_by_one(loss):
    """The losses of single examples, in evaluation mode: ``[C, n]``."""
    model, rows = copy.deepcopy(MODEL).eval(), []
    for item in RUN:
        model.load_state_dict(item["state_dict"])
        rows.append([float(loss(model(X[i : i + 1]), Y[i : i + 1]).sum()) for i in range(N)])
    return torch.tensor(rows, dtype=torch.float64)


class Smoothed(nn.Module):
    """A loss that does not say what it reduces over."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, outputs, targets):
        return F.cross_entropy(outputs, targets, reduction=self.kind, label_smoothing=0.2)


LOSSES = {
    f"{name} {kind}": make(kind)
    for kind in ("none", "sum", "mean")
    for name, make in {
        "declared": lambda kind: nn.CrossEntropyLoss(reduction=kind),
        "undeclared": Smoothed,
    }.items()
}


@pytest.mark.parametrize("batch_size", [1, 4, 100])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_losses_of_any_reduction_are_those_of_single_examples(loss, batch_size):
    found = checkpoint_losses(MODEL, DATA, RUN, loss, batch_size=batch_size)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, one_by_one(loss))


def test_the_model_comes_back_as_it_was():
    model = copy.deepcopy(MODEL).train()
    model[0].eval()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    checkpoint_losses(model, DATA, RUN, nn.CrossEntropyLoss())
    checkpoint_logits(model, DataLoader(DATA, batch_size=3), RUN)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [model.training, model[0].training, model[1].training] == [True, False, True]


def test_the_live_state_dict_is_a_checkpoint():
    found = checkpoint_losses(MODEL, DATA, [RUN[0], MODEL.state_dict()], nn.CrossEntropyLoss())
    own = F.cross_entropy(copy.deepcopy(MODEL).eval()(X), Y, reduction="none").detach()
    torch.testing.assert_close(found[1], own)


def test_several_positions_are_summed():
    images = TensorDataset(X, X[:, :3])
    found = checkpoint_losses(MODEL, images, RUN, nn.MSELoss(reduction="none"), batch_size=4)
    model = copy.deepcopy(MODEL).eval()
    model.load_state_dict(RUN[2]["state_dict"])
    torch.testing.assert_close(found[2], (model(X) - X[:, :3]).square().sum(1).detach())
    means = checkpoint_losses(MODEL, images, RUN, nn.MSELoss(), batch_size=4)
    torch.testing.assert_close(found, 3 * means)


class Tokens(nn.Module):
    """A language model that computes its own loss, the mean over labelled tokens."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Embedding(5, 5)

    def forward(self, ids, labels):
        logits = self.layer(ids)
        return SimpleNamespace(
            logits=logits, loss=F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        )


class Own(Tokens):
    """The same, of a formula that is not known."""

    def forward(self, ids, labels):
        outputs = super().forward(ids, labels)
        return SimpleNamespace(loss=outputs.loss + self.layer(ids).square().mean())


@pytest.mark.parametrize("kind", [Tokens, Own])
def test_a_models_own_loss_is_taken(kind):
    model = kind().double()
    ids = torch.randint(0, 5, (N, 6), generator=GENERATOR)
    data = [{"ids": row, "labels": row.flip(0)} for row in ids]
    found = checkpoint_losses(model, data, [model.state_dict()], batch_size=4)
    each = [model(row[None], row.flip(0)[None]).loss.item() for row in ids]
    torch.testing.assert_close(found, torch.tensor([each], dtype=torch.float64))


def test_own_load_functions_and_files_are_taken(tmp_path):
    for place, item in enumerate(RUN):
        torch.save(item, tmp_path / f"ck{place}.pt")
    expected = one_by_one(nn.CrossEntropyLoss())
    loss = nn.CrossEntropyLoss(reduction="none")
    torch.testing.assert_close(checkpoint_losses(MODEL, DATA, tmp_path, loss), expected)

    def load(model, name):
        return load_checkpoint(model, tmp_path / name)

    names = ["ck0.pt", "ck1.pt", "ck2.pt"]
    found = checkpoint_losses(MODEL, DATA, names, loss, checkpoints_load_func=load)
    torch.testing.assert_close(found, expected)


def test_logits_are_those_of_the_model():
    found = checkpoint_logits(MODEL, DATA, RUN, batch_size=4)
    assert found.shape == (3, N, CLASSES)
    assert checkpoint_logits(network(), TensorDataset(X.float(), Y), RUN).dtype == torch.float64
    losses = F.cross_entropy(found.flatten(0, 1), Y.repeat(3), reduction="none").view(3, N)
    torch.testing.assert_close(losses, one_by_one(nn.CrossEntropyLoss()))
    # what they are for
    assert len(low_margin(found, Y)) == len(mean_loss(losses)) == len(last_loss(losses)) == N


def test_logits_in_an_output_are_found():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = MODEL

        def forward(self, x):
            return {"logits": self.inner(x)}

    run = [{f"inner.{name}": value for name, value in RUN[0]["state_dict"].items()}]
    found = checkpoint_logits(Wrapped(), DATA, run)
    assert torch.equal(found, checkpoint_logits(MODEL, DATA, RUN[:1]))


def token_mean(outputs: Tensor, targets: Tensor) -> Tensor:
    """A mean over labelled positions, of which the examples have different numbers."""
    return F.cross_entropy(outputs, targets.where(targets > 0, -100))


def weighted(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, torch.tensor([1.0, 2.0, 3.0]).double())


IMAGES = nn.Sequential(nn.Linear(4, 4), nn.Unflatten(1, (2, 2))).double()


class Once:
    """Batches that can be gone through only once."""

    def __init__(self):
        self.batches = iter([(X, Y)])

    def __iter__(self):
        return self.batches


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: checkpoint_losses(MODEL, DATA, RUN, weighted),
            InvalidArgumentError,
            "`loss_fn` is not a sum or mean over examples: 11 examples together have",
        ),
        (
            lambda: checkpoint_losses(MODEL, DATA, RUN, lambda z, y: z[:, 0].repeat(2)),
            InvalidArgumentError,
            r"returned a tensor of shape \[22\] for 11 examples; its first dimension must count",
        ),
        (
            lambda: checkpoint_losses(MODEL, DATA, RUN, lambda z, y: z[:, 0] / (y != 1)),
            NonFiniteError,
            r"the loss of example 1 at checkpoint 0 \(in memory\) is -?inf",
        ),
        (
            lambda: checkpoint_losses(MODEL, DATA, RUN, token_mean),
            NonFiniteError,
            "the loss of example 0 at checkpoint 0 .* is nan",
        ),
        (
            lambda: checkpoint_logits(IMAGES, DATA, [IMAGES.state_dict()]),
            InvalidArgumentError,
            r"logits of shape \[11, 2, 2\] for 11 examples; expected \[n, c\], one row per example",
        ),
        (
            lambda: checkpoint_losses(MODEL, Once(), RUN, nn.CrossEntropyLoss()),
            InvalidArgumentError,
            "`dataset` gives its examples only once, but it is read several times",
        ),
        (
            lambda: checkpoint_losses(MODEL, EMPTY, RUN, nn.CrossEntropyLoss()),
            InvalidArgumentError,
            "`dataset` gave no examples at checkpoint 0; it must give the same examples in",
        ),
        (
            lambda: checkpoint_losses(MODEL, DATA, [], nn.CrossEntropyLoss()),
            InvalidArgumentError,
            "an empty list",
        ),
        (
            lambda: checkpoint_losses(MODEL, DataLoader(DATA, shuffle=True), RUN, token_mean),
            InvalidArgumentError,
            r"`dataset` is a DataLoader that shuffles",
        ),
    ],
)
def test_what_has_no_losses_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_progress_is_shown(capsys):
    checkpoint_logits(MODEL, DATA, RUN, show_progress=True)
    assert "logits: 100%" in capsys.readouterr().err
