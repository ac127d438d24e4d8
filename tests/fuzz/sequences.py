"""Parts for sequences ``[n, t, w]``, with a mask ``[n, t]`` where their lengths differ."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fuzz.draw import Draw
from fuzz.vectors import POINTWISE
from fuzz.wrappers import wrapped

RECURRENT = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}


class Recurrent(nn.Module):
    def __init__(self, layer: nn.Module, packed: bool) -> None:
        super().__init__()
        self.layer, self.packed = layer, packed

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        first = self.layer.batch_first
        x = x if first else x.transpose(0, 1)
        if self.packed:
            t = x.shape[1 if first else 0]
            n = x.shape[0 if first else 1]
            lengths = torch.full((n,), t) if mask is None else mask.sum(1)
            packed = pack_padded_sequence(x, lengths, first, enforce_sorted=False)
            found, _ = pad_packed_sequence(self.layer(packed)[0], first, total_length=t)
        else:
            found = self.layer(x)[0]
        return found if first else found.transpose(0, 1)


class Attention(nn.Module):
    def __init__(self, w: int, first: bool, weights: bool) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(w, 1 if w % 2 else 2, batch_first=first)
        self.weights = weights

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        first = self.layer.batch_first
        given = x if first else x.transpose(0, 1)
        hidden = None if mask is None else ~mask
        found, _ = self.layer(
            given, given, given, key_padding_mask=hidden, need_weights=self.weights
        )
        return x + (found if first else found.transpose(0, 1))


class Encoder(nn.Module):
    def __init__(self, w: int, first: bool, before: bool) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(
            w, 1 if w % 2 else 2, 5, 0.1, batch_first=first, norm_first=before
        )

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        first = self.layer.self_attn.batch_first
        given = x if first else x.transpose(0, 1)
        found = self.layer(given, src_key_padding_mask=None if mask is None else ~mask)
        return found if first else found.transpose(0, 1)


class Causal(nn.Module):
    def __init__(self, w: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(w, 3 * w), nn.Linear(w, w)

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))


class OverTime(nn.Module):
    """A convolution over time; what is padded is zero."""

    def __init__(self, w: int) -> None:
        super().__init__()
        self.layer = nn.Conv1d(w, w, 3, padding=1)

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        x = x if mask is None else x * mask[..., None]
        return self.layer(x.transpose(1, 2)).transpose(1, 2).tanh()


class Positions(nn.Module):
    """Learnt positions: of the batch ``[t]``, ``[1, t]``, or of each example ``[n, t]``."""

    def __init__(self, w: int, how: str) -> None:
        super().__init__()
        self.table, self.how = nn.Embedding(8, w), how

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        n, t = x.shape[:2]
        ids = torch.arange(t)
        if self.how == "positions [1, t]":
            ids = ids[None]
        elif self.how == "positions [n, t]":
            ids = ids.expand(n, t)
        return x + self.table(ids)


class FoldedTime(nn.Module):
    """``view(n * t, w)``, or time first."""

    def __init__(self, w: int, how: str) -> None:
        super().__init__()
        self.layer, self.how = nn.Linear(w, w), how

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        if self.how == "folded":
            return self.layer(x.reshape(-1, x.shape[-1])).tanh().view(x.shape)
        if self.how == "time-first layer":
            return self.layer(x.transpose(0, 1)).tanh().transpose(0, 1)
        turned = x.transpose(0, 1)
        found = self.layer(turned.reshape(-1, x.shape[-1])).tanh()
        return found.view(turned.shape).transpose(0, 1)


class OnlyValid(nn.Module):
    """A layer that sees the positions that count, those of all examples in one row."""

    def __init__(self, w: int) -> None:
        super().__init__()
        self.layer = nn.Linear(w, w)

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        if mask is None:
            return self.layer(x)
        found = torch.zeros_like(x)
        found[mask] = self.layer(x[mask])
        return found


def _recurrent(draw: Draw, w: int) -> Any:
    kind = draw.one(list(RECURRENT))
    first, packed = draw.chance(0.5), draw.chance(0.2)
    draw.note(kind)
    draw.note("batch first" if first else "time-first layer")
    if packed:
        draw.note("packed")
    layers = draw.one([1, 1, 2])
    return lambda: Recurrent(RECURRENT[kind](w, w, layers, batch_first=first), packed)


def _attention(draw: Draw, w: int) -> Any:
    first, weights = draw.chance(0.5), draw.chance(0.5)
    return lambda: Attention(w, first, weights)


def _encoder(draw: Draw, w: int) -> Any:
    first, before = draw.chance(0.6), draw.chance(0.5)
    return lambda: Encoder(w, first, before)


def _positions(draw: Draw, w: int) -> Any:
    how = draw.one(["positions [t]", "positions [1, t]", "positions [n, t]"])
    draw.note(how)
    return lambda: Positions(w, how)


def _folded(draw: Draw, w: int) -> Any:
    how = draw.one(["folded", "time-first layer", "folded time first"])
    draw.note(how)
    return lambda: FoldedTime(w, how)


def _pointwise(draw: Draw, w: int) -> Any:
    kept = ("layer norm", "rms norm", "bare parameters", "tied back", "shared weight", "mixture")
    more = ("scaled subclass", "low rank", "in place", "outside its layer", "detached", "merging")
    make, _ = draw.call({k: POINTWISE[k] for k in (*kept, *more)}, w)
    return make


OF_SEQUENCES: dict[str, tuple[float, Any]] = {
    "recurrent": (4, _recurrent),
    "attention": (3, _attention),
    "transformer layer": (2, _encoder),
    "causal attention": (2, lambda draw, w: lambda: Causal(w)),
    "conv over time": (1, lambda draw, w: lambda: OverTime(w)),
    "positions": (2, _positions),
    "folded positions": (2, _folded),
    "valid positions": (1, lambda draw, w: lambda: OnlyValid(w)),
    "pointwise": (3, _pointwise),
}


def sequence_part(draw: Draw, w: int) -> nn.Module:
    return wrapped(draw, draw.call(OF_SEQUENCES, w), keeps=True)
