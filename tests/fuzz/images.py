"""Parts for signals, images and volumes ``[n, c, *s]``."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fuzz.draw import Draw
from fuzz.vectors import activation, batch_norm
from fuzz.wrappers import Part, wrapped

Make = Callable[[], nn.Module]
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
POOL = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}


def _conv(draw: Draw, shape: tuple[int, ...]) -> Make:
    c, sides = shape[0], shape[1:]
    groups = draw.one([1, 1, c])
    out = groups * draw.randint(1, 2) if groups > 1 else draw.randint(2, 4)
    kernel = min(draw.one([1, 2, 3, 3]), *sides)
    options: dict[str, Any] = {"groups": groups, "bias": draw.chance(0.7)}
    if draw.chance(0.25):
        options["padding"] = "same"
    else:
        options["padding"] = draw.randint(0, 1) if kernel > 1 else 0
        options["stride"] = draw.randint(1, 2)
        reach = 2 * (kernel - 1) + 1
        options["dilation"] = (
            draw.one([1, 2]) if min(sides) + 2 * options["padding"] >= reach else 1
        )
    if options["padding"] and draw.chance(0.4):
        options["padding_mode"] = draw.one(["circular", "reflect", "replicate"])
        draw.note("padding mode")
    if options["padding"] == "same":
        draw.note("same padding")
    if groups > 1:
        draw.note("groups")
    kind = CONV[len(sides)]
    return lambda: Part(kind(c, out, kernel, **options), activation(draw))


def _transposed(draw: Draw, shape: tuple[int, ...]) -> Make:
    c, kind = shape[0], TRANSPOSED[len(shape) - 1]
    groups = draw.one([1, 1, c])
    stride = draw.randint(1, 2)
    options = {"stride": stride, "groups": groups, "padding": draw.randint(0, 1)}
    options["output_padding"] = draw.randint(0, stride - 1)
    out = groups * draw.randint(1, 2)
    return lambda: Part(kind(c, out, 3, **options), activation(draw))


def _instance_norm(draw: Draw, shape: tuple[int, ...]) -> Make:
    running = draw.chance(0.3)
    kind = INSTANCE[len(shape) - 1]

    def make() -> nn.Module:
        norm = kind(shape[0], affine=True, track_running_stats=running)
        return Part(batch_norm(draw, norm) if running else norm)

    return make


def _groups(draw: Draw, shape: tuple[int, ...]) -> Make:
    groups = draw.one([g for g in range(1, shape[0] + 1) if shape[0] % g == 0])
    return lambda: Part(nn.GroupNorm(groups, shape[0]))


class ChannelsLast(nn.Module):
    """A linear layer over channels, the other dimensions being positions."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.layer = nn.Linear(c, c)

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        return self.layer(x.movedim(1, -1)).tanh().movedim(-1, 1)


PARTS: dict[str, tuple[float, Any]] = {
    "conv": (6, _conv),
    "transposed conv": (2, _transposed),
    "batch norm": (1, lambda d, s: lambda: Part(batch_norm(d, BATCH[len(s) - 1](s[0])))),
    "instance norm": (1, _instance_norm),
    "group norm": (1, _groups),
    "layer norm": (0.5, lambda d, s: lambda: Part(nn.LayerNorm(list(s)))),
    "channels last": (1, lambda d, s: lambda: ChannelsLast(s[0])),
    "prelu": (0.5, lambda d, s: lambda: Part(nn.PReLU(s[0]))),
    "pool": (1, lambda d, s: lambda: Part(POOL[len(s) - 1](2))),
}


def image_part(draw: Draw, shape: tuple[int, ...]) -> nn.Module:
    small = min(shape[1:]) < 2 or shape[1:].count(1) or max(shape[1:]) > 9
    parts = {k: v for k, v in PARTS.items() if not small or k in ("channels last", "prelu")}
    make = draw.call(parts, shape)
    return wrapped(draw, make, keeps=False)
