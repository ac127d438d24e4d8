"""Language models, data and losses for the tests of token scores."""

from typing import Any

import torch
from cases import TinyGPT
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY, T, WIDTH = 9, 5, 6


class LowRank(nn.Module):
    """A linear layer with a low-rank addition in layers of its own, as adapters have it."""

    def __init__(self, width: int, rank: int = 2) -> None:
        super().__init__()
        self.base = nn.Linear(width, width)
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Adapted(nn.Module):
    """Embeddings, a low-rank layer that is called twice, attention, a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.norm = nn.Embedding(VOCABULARY, WIDTH), nn.LayerNorm(WIDTH)
        self.mix, self.head = LowRank(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.tokens(ids))
        q, v = self.mix(x), self.mix(x.tanh())
        weights = (q @ q.transpose(1, 2)).tril().softmax(-1)
        return self.head(x + weights @ v)


def tied() -> nn.Module:
    torch.manual_seed(0)
    return TinyGPT(VOCABULARY, WIDTH, T).double()


def adapted() -> nn.Module:
    torch.manual_seed(0)
    return Adapted().double()


MODELS = {"tied": tied, "adapted": adapted}


def tokens(n: int, seed: int, t: int = T, ignored: int = 0) -> tuple[Tensor, Tensor]:
    """Ids and labels ``[n, t]``, of which example j ignores the last j % (ignored + 1)."""
    generator = torch.Generator().manual_seed(seed)
    ids, labels = torch.randint(0, VOCABULARY, (2, n, t), generator=generator)
    for j in range(n):
        labels[j, t - j % (ignored + 1) :] = -100
    return ids, labels


def terms(outputs: Tensor, labels: Tensor) -> Tensor:
    """The loss of each token, ``[n, t]``."""
    return F.cross_entropy(outputs.transpose(1, 2), labels, reduction="none")


def total(outputs: Tensor, labels: Tensor) -> Tensor:
    """The loss of each example, ``[n]``."""
    return terms(outputs, labels).sum(1)


def checkpoints(model: nn.Module) -> list[dict[str, Any]]:
    """Two, with learning rates; tied weights stay tied."""
    found = []
    for seed, rate in enumerate((0.3, 0.05)):
        generator = torch.Generator().manual_seed(seed)
        moved = {
            id(p): p.detach() + 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
            for p in model.parameters()
        }
        state = {k: moved[id(p)] for k, p in model.state_dict(keep_vars=True).items()}
        found.append({"state_dict": state, "learning_rate": rate})
    return found
