"""Losses that models compute themselves, known by values alone, against single examples."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import influence_kit as ik
from influence_kit.errors import InvalidArgumentError

N, T, V = 16, 6, 7
Own = Callable[[Tensor, Tensor, Tensor], Tensor]


class Model(nn.Module):
    """A language model that returns a loss of its own."""

    def __init__(self, own: Own) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.own, self.embed, self.head = own, nn.Embedding(V, 4), nn.Linear(4, V)
        self.double()

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        hidden = self.embed(input_ids).tanh()
        logits = self.head(hidden)
        return {"logits": logits, "loss": self.own(hidden, logits, labels)}


def smoothed(hidden: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)


def with_zero(hidden: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    added = hidden.sum((1, 2)).mean()
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten()) + added - added.detach()


def examples(equal: int, without: int = 0) -> list[dict[str, Tensor]]:
    """Examples, the first of which have no label, and then some that have all their labels."""
    ids, labels = torch.randint(0, V, (2, N, T), generator=torch.Generator().manual_seed(1))
    for j in range(equal, N):
        labels[j, : 1 + j % 4] = -100
    labels[:without] = -100
    return [{"input_ids": ids[j], "labels": labels[j]} for j in range(N)]


def method(own: Own, rows: list[Any]) -> ik.GradDot:
    model = Model(own)
    loader: Any = torch.utils.data.DataLoader(rows, batch_size=4)  # type: ignore[arg-type]
    return ik.GradDot(model, loader, [model.state_dict()])


def of_one(own: Own, rows: list[dict[str, Tensor]]) -> Tensor:
    """The gradient of each example alone."""
    model = Model(own)
    found = []
    for row in rows:
        loss = model(**{key: value[None] for key, value in row.items()})["loss"]
        parts = torch.autograd.grad(loss, list(model.parameters()))
        found.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(found)


@pytest.mark.parametrize("own", [smoothed, with_zero])
def test_equal_examples(own: Own) -> None:
    rows = examples(N)
    test = torch.utils.data.default_collate(rows[:2])
    gradients = of_one(own, rows)
    torch.testing.assert_close(
        method(own, rows).influence(test), gradients[:2] @ gradients.T, rtol=1e-10, atol=1e-12
    )


def test_unequal_examples_in_a_later_batch() -> None:
    rows = examples(12)
    test = torch.utils.data.default_collate(rows[:2])
    with pytest.raises(InvalidArgumentError, match="is not a mean over examples"):
        method(smoothed, rows).influence(test)


def test_no_labels_in_a_later_batch() -> None:
    rows = examples(N)
    rows[13]["labels"][:] = -100
    test = torch.utils.data.default_collate(rows[:2])
    with pytest.raises(InvalidArgumentError, match=r"is not finite alone .*no mean"):
        method(smoothed, rows).influence(test)


@pytest.mark.parametrize("without", [0, 1])
def test_an_added_loss_of_value_zero(without: int) -> None:
    rows = examples(2, without)
    test = torch.utils.data.default_collate(rows[2:4])
    with pytest.raises(InvalidArgumentError, match="loss"):
        method(with_zero, rows).influence(test)
