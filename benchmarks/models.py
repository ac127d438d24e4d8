"""The models and data of the speed benchmark: an MLP, a CNN and a small GPT, with random data."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset


def mlp() -> nn.Module:
    """784-512-256-10, 0.54 M parameters."""
    return nn.Sequential(
        nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10)
    )


def cnn() -> nn.Module:
    """3x32x32 images, four convolutions, no norm layers, 0.32 M parameters."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 128, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(128, 128, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128 * 4 * 4, 37),
        nn.ReLU(),
        nn.Linear(37, 10),
    )


class Block(nn.Module):
    """A pre-norm transformer block with causal attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        q, k, v = (
            part.view(n, t, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, t, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """4 layers, width 128, context 64, vocabulary 256."""

    def __init__(self, layers: int = 4, width: int = 128, context: int = 64, vocab: int = 256):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, 4) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1], device=ids.device)
        return self.head(self.norm(self.blocks(self.tokens(ids) + self.positions(places))))


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The sum over the batch of every sequence's mean token loss."""
    losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    return losses.mean(1).sum()


@dataclass(frozen=True)
class Case:
    """One line of the table: a model, n training and q test examples, c checkpoints."""

    name: str
    build: Callable[[], nn.Module]
    data: Callable[[int], tuple[Tensor, Tensor]]
    loss_fn: Callable[[Tensor, Tensor], Tensor]
    n: int
    q: int
    checkpoints: int

    def dataset(self) -> TensorDataset:
        """The training set."""
        return TensorDataset(*self.data(self.n))

    def weights(self) -> list[dict[str, Tensor]]:
        """State dicts of models drawn at random."""
        torch.manual_seed(0)
        return [self.build().state_dict() for _ in range(self.checkpoints)]


def _vectors(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 784), torch.randint(0, 10, (n,))


def _images(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 3, 32, 32), torch.randint(0, 10, (n,))


def _sequences(n: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, 256, (n, 65))
    return ids[:, :-1], ids[:, 1:]


CASES = [
    Case("MLP 784-512-256-10", mlp, _vectors, nn.CrossEntropyLoss(reduction="sum"), 2048, 128, 3),
    Case("CNN 3x32x32", cnn, _images, nn.CrossEntropyLoss(reduction="sum"), 256, 32, 1),
    Case("GPT 4x128, context 64", GPT, _sequences, token_loss, 256, 32, 1),
]
