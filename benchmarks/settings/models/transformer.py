"""Causal transformers: a GPT as nanoGPT has it, and the Music Transformer (arXiv 1809.04281).

Tables of positions are embeddings that are looked up for every example, not once for the batch, so
that they have per-example gradients like any other layer.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """A transformer block: x + attention, then x + feed-forward layers.

    Args:
        attention: maps ``[n, t, w]`` to ``[n, t, w]``.
        width: w.
        hidden: the width between the two feed-forward layers.
        activation: between them.
        norm_first: normalise what goes into each part (GPT); else what comes out (the original
            transformer).
        dropout: probability, of what each part adds.
    """

    def __init__(
        self,
        attention: nn.Module,
        width: int,
        hidden: int,
        activation: nn.Module,
        norm_first: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        self.attention = attention
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.activation, self.dropout = activation, nn.Dropout(dropout)
        self.norm_first = norm_first

    def forward(self, x: Tensor) -> Tensor:
        if self.norm_first:
            x = x + self.dropout(self.attention(self.norm1(x)))
            return x + self._feed_forward(self.norm2(x))
        x = self.norm1(x + self.dropout(self.attention(x)))
        return self.norm2(x + self._feed_forward(x))

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down(self.activation(self.up(x))))


class CausalAttention(nn.Module):
    """softmax(Q K^T / sqrt(w / h)) V over the positions up to each one."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self._by_head(part) for part in self.qkv(x).chunk(3, dim=-1))
        return self.out(self._attend(q, k, v).transpose(1, 2).flatten(2))

    def _by_head(self, x: Tensor) -> Tensor:
        """``[n, t, w]`` as ``[n, h, t, w / h]``."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)


class RelativeAttention(CausalAttention):
    """softmax((Q K^T + S) / sqrt(w / h)) V, with S[i, j] = q_i . e[i - j] for j <= i.

    e holds a vector for each distance and head; S is found by the paper's skewing, without a
    ``[t, t, w]`` tensor.

    Args:
        width: w.
        heads: h.
        context: the greatest t; distances are 0 to context - 1.
        dropout: probability, of the attention's weights.
    """

    def __init__(self, width: int, heads: int, context: int, dropout: float = 0.0) -> None:
        super().__init__(width, heads, dropout)
        self.distances = nn.Embedding(context, width)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n, _, t, size = q.shape
        ahead = torch.ones(t, t, dtype=torch.bool, device=q.device).triu(1)
        # from the greatest distance to 0, as skewing wants them
        numbers = torch.arange(t - 1, -1, -1, device=q.device).expand(n, t)
        e = self._by_head(self.distances(numbers))
        logits = q @ k.transpose(-1, -2) + skewed(q @ e.transpose(-1, -2))
        weights = (logits / math.sqrt(size)).masked_fill(ahead, -torch.inf).softmax(-1)
        return F.dropout(weights, self.dropout, self.training) @ v


def skewed(products: Tensor) -> Tensor:
    """Products by distance ``[..., t, t]`` moved to where they belong.

    In: entry (i, c) belongs to the distance t - 1 - c. Out: entry (i, j) is that of the distance
    i - j; those with j > i mean nothing.
    """
    t = products.shape[-1]
    lengthened = F.pad(products, (1, 0)).flatten(-2)
    return lengthened.unflatten(-1, (t + 1, t))[..., 1:, :]


class GPT(nn.Module):
    """A causal language model: tokens ``[n, t]`` to logits ``[n, t, c]``, with learned positions.

    Args:
        tokens: c.
        context: the greatest t.
        layers: blocks.
        width: w.
        heads: h.
        dropout: probability, of embeddings, attention and what blocks add.
        tied: give the head the weights of the token embedding, as nanoGPT does.
    """

    def __init__(
        self,
        tokens: int,
        context: int,
        layers: int,
        width: int,
        heads: int,
        dropout: float = 0.0,
        tied: bool = True,
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(tokens, width), nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(
            *(
                Block(
                    CausalAttention(width, heads, dropout),
                    width,
                    4 * width,
                    nn.GELU(),
                    True,
                    dropout,
                )
                for _ in range(layers)
            )
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, tokens, bias=False)
        self.apply(_draw_weights)
        for name, weight in self.blocks.named_parameters():
            if name.endswith(("attention.out.weight", "down.weight")):
                # 2 * layers of them add to what runs through: the deeper, the smaller at the start
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * layers))
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        x = self.dropout(self.tokens(ids) + self.positions(places))
        return self.head(self.norm(self.blocks(x)))


def _draw_weights(layer: nn.Module) -> None:
    """GPT-2's initial weights."""
    if isinstance(layer, nn.Linear | nn.Embedding):
        nn.init.normal_(layer.weight, std=0.02)
    if isinstance(layer, nn.Linear) and layer.bias is not None:
        nn.init.zeros_(layer.bias)


class MusicTransformer(nn.Module):
    """A causal transformer with relative attention: events ``[n, t]`` to logits ``[n, t, c]``.

    Args:
        tokens: c.
        context: the greatest t.
        layers: blocks.
        width: w.
        heads: h.
        hidden: the width of the feed-forward layers.
        dropout: probability, of embeddings, attention and what blocks add.
    """

    def __init__(
        self,
        tokens: int,
        context: int,
        layers: int = 6,
        width: int = 512,
        heads: int = 8,
        hidden: int = 1024,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.tokens, self.dropout = nn.Embedding(tokens, width), nn.Dropout(dropout)
        self.waves: Tensor
        self.register_buffer("waves", sinusoids(context, width), persistent=False)
        self.blocks = nn.Sequential(
            *(
                Block(
                    RelativeAttention(width, heads, context, dropout),
                    width,
                    hidden,
                    nn.ReLU(),
                    False,
                    dropout,
                )
                for _ in range(layers)
            )
        )
        self.head = nn.Linear(width, tokens)

    def forward(self, ids: Tensor) -> Tensor:
        embedded = self.tokens(ids) * math.sqrt(self.tokens.embedding_dim)
        x = self.dropout(embedded + self.waves[: ids.shape[1]])
        return self.head(self.blocks(x))


def sinusoids(context: int, width: int) -> Tensor:
    """The positions of the original transformer (arXiv 1706.03762), ``[context, width]``."""
    rates = 10000.0 ** (-torch.arange(0, width, 2) / width)
    angles = torch.arange(context)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :width]
