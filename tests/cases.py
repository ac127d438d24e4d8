"""Models x data x losses: what every method is run on. All in float64, tiny, with fixed seeds."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

CLASSES = 3
RATES = (0.3, 0.05, 1.7)


class Examples(Dataset):
    """The examples of one big batch."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return len(
            next(iter(self.batch.values()) if isinstance(self.batch, Mapping) else iter(self.batch))
        )

    def __getitem__(self, i: int) -> Any:
        if isinstance(self.batch, Mapping):
            return {key: value[i] for key, value in self.batch.items()}
        return tuple(value[i] for value in self.batch)


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none")


def token_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.transpose(1, 2), targets, reduction="none")


class TanhMLP(nn.Module):
    """A multilayer perceptron; ``extra`` is not used by its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh())
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class DictMLP(TanhMLP):
    """The same with keyword inputs, as dict batches call it."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"logits": super().forward(x)}


def small_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, stride=2),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(6, CLASSES),
    )


class TinyGPT(nn.Module):
    """Embeddings (positions without a batch dimension), attention, LayerNorm, a tied head."""

    def __init__(self, vocab: int = 7, width: int = 4, context: int = 5) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(context, width)
        self.norm = nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.head = nn.Linear(width, vocab, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return self.head(x)


@dataclass(frozen=True)
class Case:
    """A model, its data, a loss per example, and the same loss reduced.

    ``final`` names the last linear layer; ``train`` and ``test`` are batches of all examples;
    ``rates`` are the learning rates of the checkpoints.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[int], Any]
    loss: Callable[[Any, Any], Tensor]
    final: str
    n: int = 11
    m: int = 4
    rates: tuple[float, ...] = RATES

    def model(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return self.build().double()

    def checkpoints(self) -> list[dict[str, Any]]:
        """State dicts with learning rates, from models drawn at random."""
        return [
            {"state_dict": self.model(seed + 1).state_dict(), "learning_rate": rate}
            for seed, rate in enumerate(self.rates)
        ]

    @property
    def states(self) -> list[Mapping[str, Tensor]]:
        return [checkpoint["state_dict"] for checkpoint in self.checkpoints()]

    @property
    def train(self) -> Any:
        torch.manual_seed(10)
        return self.batch(self.n)

    @property
    def test(self) -> Any:
        torch.manual_seed(20)
        return self.batch(self.m)


def _vectors(n: int) -> Any:
    return torch.randn(n, 4, dtype=torch.float64), torch.arange(n) % CLASSES


def _dict_of_vectors(n: int) -> Any:
    x, y = _vectors(n)
    return {"x": x, "labels": y}


def _images(n: int) -> Any:
    return torch.randn(n, 2, 6, 6, dtype=torch.float64), torch.arange(n) % CLASSES


def _sequences(n: int) -> Any:
    ids = torch.randint(0, 7, (n, 6))
    return ids[:, :-1], ids[:, 1:]


def _dict_loss(outputs: Any, batch: Any) -> Tensor:
    return cross_entropy(outputs["logits"], batch["labels"])


CASES = {
    "mlp": Case(TanhMLP, _vectors, cross_entropy, "head"),
    "dict": Case(DictMLP, _dict_of_vectors, _dict_loss, "head"),
    "cnn": Case(small_cnn, _images, cross_entropy, "6"),
    "gpt": Case(TinyGPT, _sequences, token_cross_entropy, "out"),
}
# the same with two checkpoints, for what is asked of every method many times
SHORT = {name: replace(case, rates=RATES[::2]) for name, case in CASES.items()}


def reduced(loss: Callable[[Any, Any], Tensor], reduction: str) -> Callable[[Any, Any], Tensor]:
    """The loss as a user's reduced one, with Captum's attribute."""

    def call(outputs: Any, targets: Any) -> Tensor:
        losses = loss(outputs, targets)
        losses = losses.flatten(1).sum(1) if losses.dim() > 1 else losses
        return losses if reduction == "none" else getattr(losses, reduction)()

    call.reduction = reduction  # type: ignore[attr-defined]
    return call
