"""Random networks: a stem, parts, a pooling, a head; and the ways a user's batch calls them."""

from typing import Any

import torch
from torch import Tensor, nn

from fuzz.draw import Draw
from fuzz.images import image_part
from fuzz.sequences import sequence_part
from fuzz.vectors import vector_part
from fuzz.wrappers import ChangingInput, Part

VOCABULARY = 7
FAMILIES = {"vectors": 4, "images": 3, "series": 3, "tokens": 3, "bag": 1}


def valid(mask: Any, x: Tensor) -> Any:
    """A mask ``[n, t]`` of what counts, from a mask or from lengths ``[n]``."""
    if mask is None:
        return None
    if mask.dim() == 1:
        return torch.arange(x.shape[1])[None] < mask[:, None]
    return mask.bool()


class Pool(nn.Module):
    """One vector for each example."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        if self.how == "flat":
            return x.flatten(1)
        if self.how == "space":
            return x.flatten(2).mean(2)
        if self.how == "first":
            return x[:, 0]
        weights = x.new_ones(x.shape[:2]) if mask is None else mask.to(x)
        if self.how == "last":
            last = weights.sum(1).long() - 1
            return x[torch.arange(len(x)), last]
        total = (x * weights[..., None]).sum(1)
        return total if self.how == "sum" else total / weights.sum(1, keepdim=True)


class Net(nn.Module):
    """The network; ``stem`` and ``pool`` may be None, and a head of tokens tied to the stem."""

    def __init__(self, stem: Any, parts: list[nn.Module], pool: Any) -> None:
        super().__init__()
        self.stem, self.parts, self.pool = stem, nn.ModuleList(parts), pool
        self.head: nn.Module | None = None
        self.pad: int | None = None
        self.time_first, self.squeezes, self.how = False, False, ""

    def encode(self, x: Tensor, mask: Any = None) -> Tensor:
        x = x.transpose(0, 1) if self.time_first else x
        mask = (x != self.pad) if self.pad is not None else valid(mask, x)
        if self.stem is not None:
            x = self.stem(x)
        for part in self.parts:
            x = part(x, mask)
        return x if self.pool is None else self.pool(x, mask)

    def features(self, x: Tensor, other: Any = None, mask: Any = None) -> Tensor:
        if other is None or self.how == "":
            return self.encode(x, mask)
        if self.how == "beside":
            return torch.cat([self.encode(x, mask), other], 1)
        if self.how == "stacked halves":
            one, two = self.encode(torch.cat([x, other])).chunk(2)
        else:
            one, two = self.encode(x), self.encode(other)
        return torch.cat([one * two, one - two], 1)

    def forward(self, x: Tensor, other: Any = None, mask: Any = None) -> Tensor:
        found = self.head(self.features(x, other, mask))
        return found.squeeze(-1) if self.squeezes else found


# The ways to call it.


class OneInput(nn.Module):
    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Bags(OneInput):
    """Bags in one row of ids, with the offsets where each begins: a batch that cannot be cut."""

    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        net = self.net
        x = net.stem(ids, offsets)
        for part in net.parts:
            x = part(x)
        found = net.head(x)
        return found.squeeze(-1) if net.squeezes else found


class MaskedInput(OneInput):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.net(x, None, mask)


class TwoInputs(OneInput):
    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return self.net(x, other)


class Pair(OneInput):
    def forward(self, pair: Any) -> Tensor:
        return self.net(*pair)


class Output:
    """A model's output object."""

    def __init__(self, logits: Tensor, loss: Any = None) -> None:
        self.logits, self.loss = logits, loss


class Keywords(nn.Module):
    """Called with a dict's keys; returns a tensor, a dict or an object, perhaps with its loss."""

    def __init__(self, net: Net, form: str, own_loss: Any = None) -> None:
        super().__init__()
        self.net, self.form, self.own_loss = net, form, own_loss

    def forward(
        self,
        x: Tensor,
        other: Any = None,
        mask: Any = None,
        labels: Any = None,
        weights: Any = None,
    ) -> Any:
        found = self.net(x, other, mask)
        loss = None
        if self.own_loss is not None:
            loss = self.own_loss(found, labels)
        if self.form == "tensor":
            return found
        if self.form == "object":
            return Output(found, loss)
        return {"logits": found} if loss is None else {"loss": loss, "logits": found}


def logits_of(outputs: Any) -> Tensor:
    if isinstance(outputs, Tensor):
        return outputs
    return outputs["logits"] if isinstance(outputs, dict) else outputs.logits


# Drawing one.


def draw_net(draw: Draw, family: str) -> tuple[Net, dict[str, Any]]:
    """A network without a head, and what its input is."""
    makers = {"vectors": _vectors, "images": _images, "series": _series, "tokens": _tokens}
    net, given = makers.get(family, _bag)(draw)
    if family in ("vectors", "series", "images") and draw.chance(0.04):
        draw.note("changes its input")
        net.parts.insert(0, ChangingInput(Part(nn.Identity())))
    return net, given


def _chain(draw: Draw, w: int, most: int = 3) -> list[nn.Module]:
    parts = []
    for _ in range(draw.randint(1, most)):
        part, w = vector_part(draw, w)
        parts.append(part)
    return parts


def _vectors(draw: Draw) -> tuple[Net, dict[str, Any]]:
    w = draw.one([4, 6])
    return Net(None, _chain(draw, w), None), {"shape": (w,)}


def _images(draw: Draw) -> tuple[Net, dict[str, Any]]:
    dims = draw.one([1, 2, 2, 3])
    draw.note(f"{dims}d")
    side = {1: draw.randint(6, 9), 2: draw.randint(4, 6), 3: draw.randint(3, 4)}[dims]
    shape = (draw.randint(1, 3), *[side] * dims)
    parts, x = [], torch.zeros(2, *shape)
    for _ in range(draw.randint(1, 3)):
        part = image_part(draw, tuple(x.shape[1:])).eval()
        x = part(x)
        parts.append(part)
    how = "space" if x[0].numel() > 24 else draw.one(["flat", "space"])
    return Net(None, parts, Pool(how)), {"shape": shape}


def _sequence_parts(draw: Draw, w: int) -> list[nn.Module]:
    return [sequence_part(draw, w) for _ in range(draw.randint(1, 2))]


def _series(draw: Draw) -> tuple[Net, dict[str, Any]]:
    w, t = draw.one([3, 4]), draw.randint(2, 5)
    pool = Pool(draw.one(["mean", "last", "sum", "first"]))
    return Net(None, _sequence_parts(draw, w), pool), {"shape": (t, w)}


def _tokens(draw: Draw) -> tuple[Net, dict[str, Any]]:
    w, t = draw.one([3, 4]), draw.randint(2, 5)
    options: dict[str, Any] = {}
    if draw.chance(0.4):
        options["padding_idx"] = 0
        draw.note("padding_idx")
    if draw.chance(0.12):
        options["scale_grad_by_freq"] = True
        draw.note("scale_grad_by_freq")
        draw.excuse("gradients scaled by frequency in the batch")
    elif draw.chance(0.1):
        options["sparse"] = True
        draw.note("sparse")
    stem = nn.Embedding(VOCABULARY, w, **options)
    pool = Pool(draw.one(["mean", "last", "sum", "first"]))
    return Net(stem, _sequence_parts(draw, w), pool), {"tokens": t}


def _bag(draw: Draw) -> tuple[Net, dict[str, Any]]:
    w, mode = draw.one([3, 4]), draw.one(["mean", "sum", "max"])
    options: dict[str, Any] = {"padding_idx": 0} if draw.chance(0.3) else {}
    stem = nn.EmbeddingBag(VOCABULARY, w, mode=mode, **options)
    return Net(stem, _chain(draw, w, 2), None), {"tokens": draw.randint(2, 5)}
