"""The terms of a loss: their gradients are those of the loss of each token by autograd."""

from functools import partial
from typing import Any

import pytest
import token_oracle
import torch
from cases import Examples
from contract import assert_close
from oracles import gradients
from token_models import VOCABULARY, T, adapted, terms, tokens
from torch import Tensor, nn
from torch.nn import functional as F

import influence_kit as ik

TRAIN, TEST = tokens(7, 1), tokens(3, 2)


class ChannelsSecond(nn.Module):
    """Logits ``[n, v, t]``, as torch's cross-entropy takes them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = adapted()

    def forward(self, ids: Tensor) -> Tensor:
        return self.inner(ids).transpose(1, 2)


class Squares(nn.Module):
    """A regression for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = adapted()

    def forward(self, ids: Tensor) -> Tensor:
        return self.inner(ids).square().mean(2)


WEIGHTS = torch.linspace(0.5, 2, VOCABULARY).double()


def weighted(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs, labels, WEIGHTS, reduction="none")


def plain(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs, labels, reduction="none")


def of_equal_shares(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """The second token of each example is ignored: all have T - 1 labels."""
    ids, labels = tokens(n, seed)
    labels[:, 1] = -100
    return ids, labels


def squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square()


def numbers(n: int, seed: int) -> tuple[Tensor, Tensor]:
    ids, labels = tokens(n, seed)
    return ids, labels.double()


@pytest.mark.parametrize(
    ("model", "data", "loss", "oracle", "share"),
    [
        (ChannelsSecond, tokens, nn.CrossEntropyLoss(), plain, T),
        (ChannelsSecond, tokens, nn.CrossEntropyLoss(reduction="sum"), plain, 1),
        (ChannelsSecond, tokens, nn.CrossEntropyLoss(reduction="none"), plain, 1),
        (ChannelsSecond, of_equal_shares, nn.CrossEntropyLoss(), plain, T - 1),
        (ChannelsSecond, tokens, nn.CrossEntropyLoss(WEIGHTS, reduction="sum"), weighted, 1),
        (Squares, numbers, nn.MSELoss(), squares, T),
        (Squares, numbers, nn.MSELoss(reduction="sum"), squares, 1),
        (Squares, numbers, nn.HuberLoss(delta=100.0), lambda o, y: squares(o, y) / 2, T),
    ],
)
def test_torchs_losses(model: Any, data: Any, loss: Any, oracle: Any, share: int) -> None:
    torch.manual_seed(0)
    made, train, test = model().double(), data(7, 1), data(3, 2)
    method = ik.GradDot(made, Examples(train), [made.state_dict()], loss_fn=loss, batch_size=7)
    g = gradients(made, train, lambda o, y: oracle(o, y).sum(1) / share)
    h = token_oracle.term_gradients(made, test, lambda o, y: oracle(o, y) / share)
    found = method.influence(test, per_token="test_terms")
    assert_close(found, torch.einsum("isp,jp->ijs", h, g), 1e-10)
    assert_close(found.sum(2), method.influence(test), 1e-10)


def test_several_values_per_token() -> None:
    """A loss ``[n, t, v]``: its entries are summed for each token."""
    model = adapted()

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        return (outputs - F.one_hot(labels, VOCABULARY)).square()

    method = ik.GradDot(model, Examples(TRAIN), [model.state_dict()], loss_fn=loss)
    g = gradients(model, TRAIN, loss)
    h = token_oracle.term_gradients(model, TEST, lambda o, y: loss(o, y).sum(2))
    found = method.influence(TEST, per_token="test_terms")
    assert_close(found, torch.einsum("isp,jp->ijs", h, g), 1e-10)


def test_an_output_that_should_rise() -> None:
    model = adapted()
    method = ik.GradDot(
        model,
        Examples(TRAIN),
        [model.state_dict()],
        loss_fn=terms,
        test_output_fn=lambda outputs, labels: -terms(outputs, labels),
    )
    lower = ik.GradDot(model, Examples(TRAIN), [model.state_dict()], loss_fn=terms)
    for side in ("train", "test_positions", "test_terms"):
        found = method.influence(TEST, per_token=side)
        assert_close(found, lower.influence(TEST, per_token=side), 1e-10)


@pytest.mark.parametrize("shift", [None, 1])
def test_margins(shift: int | None) -> None:
    """`classification_margin` as the output to explain: labels lag behind logits by the shift."""
    model, test = adapted(), tokens(3, 2, ignored=2)
    method = ik.GradDot(
        model,
        Examples(TRAIN),
        [model.state_dict()],
        loss_fn=terms,
        test_output_fn=partial(ik.classification_margin, shift=shift),
    )

    def margins(outputs: Tensor, labels: Tensor) -> Tensor:
        known = labels.clamp(min=0)[..., None]
        back = shift or 0
        logits = outputs.roll(back, 1)
        others = logits.scatter(2, known, -torch.inf).logsumexp(2)
        counts = (labels >= 0) & (torch.arange(T) >= back)
        return (logits.gather(2, known)[..., 0] - others) * counts

    h = token_oracle.term_gradients(model, test, margins)
    g = gradients(model, TRAIN, lambda o, y: terms(o, y).sum(1))
    found = method.influence(test, per_token="test_terms")
    assert_close(found, -torch.einsum("isp,jp->ijs", h, g), 1e-10)


def test_the_margin_of_a_class_has_no_terms() -> None:
    model = nn.Sequential(nn.Linear(4, 3)).double()
    batch = torch.randn(6, 4).double(), torch.arange(6) % 3
    method = ik.GradDot(
        model,
        Examples(batch),
        [model.state_dict()],
        loss_fn=nn.CrossEntropyLoss(reduction="none"),
        test_output_fn=ik.classification_margin,
    )
    with pytest.raises(ValueError, match="does not show the term of each token"):
        method.influence(batch, per_token="test_terms")
