"""Every kind of layer, and every odd use of one, against single-example autograd in float64."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import oracles
import pytest
import torch
from contract import assert_close
from torch import Tensor, nn

from influence_kit.errors import InvalidArgumentError
from influence_kit.gradients.gradient_source import GradientSource
from influence_kit.losses.loss import Loss

pytestmark = pytest.mark.quick

N = 5


def squares(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss whose gradient differs everywhere, ``[n]``."""
    outputs = outputs.reshape(len(outputs), -1)
    return ((outputs - 0.3) ** 2).sum(1) + outputs.sin().sum(1)


class Apply(nn.Module):
    """Layers as attributes, and a function of them and the input as the forward."""

    def __init__(self, forward: Callable[..., Any], **layers: Any) -> None:
        super().__init__()
        self._function = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *inputs: Tensor) -> Any:
        return self._function(self, *inputs)


class NamedLikeGPT2Linear(nn.Module):
    """The transposed linear layer of GPT-2, as the transformers package has it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, 3), self.weight).view(*x.shape[:-1], 4)


NamedLikeGPT2Linear.__module__, NamedLikeGPT2Linear.__qualname__ = (
    "transformers.pytorch_utils",
    "Conv1D",
)


class Doubling(nn.Linear):
    """A subclass with a forward of its own, which the rule of Linear does not describe."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@dataclass(frozen=True)
class LayerCase:
    """A model, its inputs, and the parameters that are expected to go without a rule."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    without_rule: tuple[str, ...] = ()


def ids(*shape: int, high: int = 6) -> Callable[[], tuple[Tensor]]:
    return lambda: (torch.randint(0, high, shape),)


def floats(*shapes: tuple[int, ...]) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: tuple(torch.randn(*shape, dtype=torch.float64) for shape in shapes)


def conv(kind: str, dims: int, *, size: int = 7, channels: int = 4, **options: Any) -> LayerCase:
    def build() -> nn.Module:
        layer = getattr(nn, f"{kind}{dims}d")
        return layer(channels, 6, 3, **options)

    return LayerCase(build, floats((N, channels, *[size] * dims)))


def normal(layer: Callable[[], nn.Module], *shape: int) -> LayerCase:
    """A norm layer with weights and statistics that are not 1 and 0."""

    def build() -> nn.Module:
        model = layer()
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                if tensor.is_floating_point():
                    tensor.uniform_(0.5, 2)
        return model

    return LayerCase(build, floats((N, *shape)))


def tied_embedding() -> nn.Module:
    model = Apply(
        lambda m, x: m.head(torch.tanh(m.table(x))),
        table=nn.Embedding(6, 4),
        head=nn.Linear(4, 6, bias=False),
    )
    model.head.weight = model.table.weight
    return model


def tied_linears() -> nn.Module:
    model = Apply(lambda m, x: m.b(torch.tanh(m.a(x))), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    model.b.weight = model.a.weight
    return model


def frozen_weight() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model


def attention() -> nn.Module:
    return Apply(
        lambda m, x: m.mix(m.enter(x), m.enter(x), x, need_weights=False)[0],
        mix=nn.MultiheadAttention(4, 2, batch_first=True),
        enter=nn.Linear(4, 4),
    )


MIX = ("mix.in_proj_weight", "mix.in_proj_bias", "mix.out_proj.weight", "mix.out_proj.bias")


def recurrent(kind: type) -> LayerCase:
    names = tuple(f"cell.{w}_l0" for w in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    return LayerCase(
        lambda: Apply(
            lambda m, x: m.head(m.cell(x)[0][:, -1]),
            cell=kind(4, 3, batch_first=True),
            head=nn.Linear(3, 2),
        ),
        floats((N, 6, 4)),
        names,
    )


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)


LAYERS = {
    "linear": LayerCase(lambda: nn.Linear(4, 3), floats((N, 4))),
    "linear, no bias": LayerCase(lambda: nn.Linear(4, 3, bias=False), floats((N, 4))),
    "linear, positions": LayerCase(lambda: nn.Linear(4, 3), floats((N, 6, 4))),
    "linear, many positions": LayerCase(lambda: nn.Linear(3, 2), floats((N, 40, 3))),
    "linear, two position axes": LayerCase(lambda: nn.Linear(4, 3), floats((N, 3, 2, 4))),
    "linear, one example": LayerCase(lambda: nn.Linear(4, 3), floats((1, 4))),
    "linear, two examples": LayerCase(lambda: nn.Linear(4, 3), floats((2, 4))),
    "linear, few positions, wide": LayerCase(lambda: nn.Linear(64, 64), floats((N, 3, 64))),
    "transposed linear": LayerCase(NamedLikeGPT2Linear, floats((N, 6, 3))),
    "bilinear": LayerCase(lambda: nn.Bilinear(3, 4, 2), floats((N, 3), (N, 4))),
    "bilinear, positions": LayerCase(lambda: nn.Bilinear(3, 4, 2), floats((N, 5, 3), (N, 5, 4))),
    "embedding": LayerCase(lambda: nn.Embedding(6, 3), ids(N, 4)),
    "embedding, one id": LayerCase(lambda: nn.Embedding(6, 3), ids(N)),
    "embedding, padding": LayerCase(lambda: nn.Embedding(6, 3, padding_idx=2), ids(N, 9)),
    "embedding, sparse": LayerCase(lambda: nn.Embedding(6, 3, sparse=True), ids(N, 4)),
    "embedding, large table": LayerCase(lambda: nn.Embedding(500, 3), ids(N, 4, high=500)),
    "conv1d": conv("Conv", 1),
    "conv2d": conv("Conv", 2),
    "conv3d": conv("Conv", 3, size=4),
    "conv2d, padding": conv("Conv", 2, padding=(1, 2)),
    "conv2d, same": conv("Conv", 2, padding="same"),
    "conv2d, same, even reach": conv("Conv", 1, padding="same", dilation=2),
    "conv2d, valid": conv("Conv", 2, padding="valid"),
    "conv2d, stride": conv("Conv", 2, stride=(2, 3), padding=1),
    "conv2d, dilation": conv("Conv", 2, dilation=2),
    "conv2d, groups": conv("Conv", 2, groups=2, padding=1),
    "conv2d, depthwise": conv("Conv", 2, channels=6, groups=6),
    "conv2d, circular": conv("Conv", 2, padding=1, padding_mode="circular"),
    "conv2d, reflect": conv("Conv", 2, padding=2, padding_mode="reflect"),
    "conv1d, replicate": conv("Conv", 1, padding=1, padding_mode="replicate", bias=False),
    "conv2d, one by one": LayerCase(lambda: nn.Conv2d(3, 4, 1), floats((N, 3, 5, 5))),
    "conv2d, small map, wide": LayerCase(lambda: nn.Conv2d(64, 64, 2), floats((N, 64, 2, 2))),
    "transposed conv1d": conv("ConvTranspose", 1),
    "transposed conv2d": conv("ConvTranspose", 2, stride=2, padding=1, output_padding=1),
    "transposed conv2d, stride > kernel": conv("ConvTranspose", 2, size=3, stride=4),
    "transposed conv2d, groups": conv("ConvTranspose", 2, groups=2, dilation=2, padding=2),
    "transposed conv3d": conv("ConvTranspose", 3, size=3, padding=2),
    "layer norm": normal(lambda: nn.LayerNorm(4), 3, 4),
    "layer norm, two dims": normal(lambda: nn.LayerNorm([3, 4]), 3, 4),
    "rms norm": normal(lambda: nn.RMSNorm(4), 3, 4),
    "group norm": normal(lambda: nn.GroupNorm(2, 4), 4, 3, 3),
    "instance norm": normal(lambda: nn.InstanceNorm2d(4, affine=True), 4, 3, 3),
    "batch norm": normal(lambda: nn.BatchNorm1d(4), 4),
    "batch norm 2d": normal(lambda: nn.BatchNorm2d(4), 4, 3, 3),
    "in-place activation": LayerCase(
        lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)),
        floats((N, 4)),
    ),
    "in-place change of part of an output": LayerCase(
        lambda: Apply(lambda m, x: m.b(_zero_first(m.a(x))), a=nn.Linear(4, 4), b=nn.Linear(4, 2)),
        floats((N, 4)),
    ),
    "residual reuse": LayerCase(
        lambda: Apply(
            lambda m, x: m.b(torch.tanh(m.a(x)) + x) + m.a(x), a=nn.Linear(4, 4), b=nn.Linear(4, 4)
        ),
        floats((N, 4)),
    ),
    "called three times": LayerCase(
        lambda: Apply(lambda m, x: m.a(m.a(m.a(x).tanh()).tanh()), a=nn.Linear(4, 4)),
        floats((N, 4)),
    ),
    "called on maps of two sizes": LayerCase(
        lambda: Apply(
            lambda m, x: m.a(x).flatten(1).sum(1) + m.a(x[..., :4]).flatten(1).sin().sum(1),
            a=nn.Conv1d(2, 2, 3),
        ),
        floats((N, 2, 7)),
    ),
    "tied embedding and head": LayerCase(tied_embedding, ids(N, 4)),
    "tied linear layers": LayerCase(tied_linears, floats((N, 4))),
    "positions shared by the batch": LayerCase(
        lambda: Apply(
            lambda m, x: m.head(m.table(x) + m.places(torch.arange(4))),
            table=nn.Embedding(6, 3),
            places=nn.Embedding(4, 3),
            head=nn.Linear(3, 2),
        ),
        ids(N, 4),
    ),
    "positions shared by the batch, with its axis": LayerCase(
        lambda: Apply(
            lambda m, x: m.norm(m.places(torch.arange(4)[None])) + m.table(x),
            table=nn.Embedding(6, 3),
            places=nn.Embedding(4, 3),
            norm=nn.LayerNorm(3),
        ),
        ids(N, 4),
    ),
    "positions shared by the batch, given an axis later": LayerCase(
        lambda: Apply(
            lambda m, x: m.head(m.table(x) + m.places(torch.arange(4)).unsqueeze(0)),
            table=nn.Embedding(6, 3),
            places=nn.Embedding(4, 3),
            head=nn.Linear(3, 2),
        ),
        ids(N, 4),
        ("places.weight",),
    ),
    "positions shared by the batch, of a fixed shape": LayerCase(
        lambda: Apply(
            lambda m, x: m.head(m.table(x) + m.places(torch.arange(4)).view(4, 3)),
            table=nn.Embedding(6, 3),
            places=nn.Embedding(4, 3),
            head=nn.Linear(3, 2),
        ),
        ids(N, 4),
        ("places.weight",),
    ),
    "folded positions": LayerCase(
        lambda: Apply(lambda m, x: m.a(x.view(-1, 4)).view(len(x), -1), a=nn.Linear(4, 3)),
        floats((N, 6, 4)),
    ),
    "folded frames": LayerCase(
        lambda: Apply(lambda m, x: m.a(x.flatten(0, 1)).view(len(x), -1), a=nn.Conv2d(2, 3, 2)),
        floats((N, 4, 2, 5, 5)),
    ),
    "time first": LayerCase(
        lambda: Apply(
            lambda m, x: m.b(m.a(x.transpose(0, 1)).tanh()).transpose(0, 1),
            a=nn.Linear(4, 3),
            b=nn.Linear(3, 2),
        ),
        floats((N, 6, 4)),
    ),
    "time first, as many steps as checked examples": LayerCase(
        lambda: Apply(lambda m, x: m.a(x.transpose(0, 1)).transpose(0, 1), a=nn.Linear(4, 3)),
        floats((N, 3, 4)),
    ),
    "keyword call": LayerCase(
        lambda: Apply(lambda m, x: m.a(input=x), a=nn.Linear(4, 3)), floats((N, 4))
    ),
    "unused layer": LayerCase(
        lambda: Apply(lambda m, x: m.a(x), a=nn.Linear(4, 3), b=nn.Linear(2, 2)), floats((N, 4))
    ),
    "unused result": LayerCase(
        lambda: Apply(lambda m, x: (m.b(x), m.a(x))[1], a=nn.Linear(4, 3), b=nn.Linear(4, 2)),
        floats((N, 4)),
    ),
    "used outside its forward": LayerCase(
        lambda: Apply(lambda m, x: m.a(x) @ m.a.weight, a=nn.Linear(4, 3)),
        floats((N, 4)),
        ("a.weight",),
    ),
    "subclass with its own forward": LayerCase(
        lambda: nn.Sequential(Doubling(4, 3), nn.Tanh(), nn.Linear(3, 2)),
        floats((N, 4)),
        ("0.weight", "0.bias"),
    ),
    "bare parameter": LayerCase(
        lambda: Apply(
            lambda m, x: m.a(x) * m.scale, a=nn.Linear(4, 3), scale=nn.Parameter(torch.ones(3))
        ),
        floats((N, 4)),
        ("scale",),
    ),
    "frozen parameters": LayerCase(frozen_weight, floats((N, 4))),
    "weight norm": LayerCase(
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)),
        floats((N, 4)),
        ("parametrizations.weight.original0", "parametrizations.weight.original1"),
    ),
    "multi-head attention": LayerCase(attention, floats((N, 6, 4)), MIX),
    "encoder layer": LayerCase(
        encoder,
        floats((N, 6, 4)),
        tuple(name.replace("mix", "self_attn") for name in MIX),
    ),
    "lstm": recurrent(nn.LSTM),
    "gru": recurrent(nn.GRU),
    "rnn": recurrent(nn.RNN),
    "what vmap cannot do": LayerCase(
        lambda: Apply(
            lambda m, x: m.a(x) * m.scale if float(x.sum()) > -1e9 else m.a(x),
            a=nn.Linear(4, 3),
            scale=nn.Parameter(torch.ones(3)),
        ),
        floats((N, 4)),
        ("scale",),
    ),
}


def _zero_first(y: Tensor) -> Tensor:
    y[:, 0] = 0
    return y


def captured(case: LayerCase) -> tuple[nn.Module, GradientSource, Any, Tensor]:
    torch.manual_seed(0)
    model = case.build().double().eval()
    inputs = case.inputs()
    batch = (*inputs, torch.zeros(len(inputs[0])))
    names = {name: p for name, p in model.named_parameters() if p.requires_grad}
    source = GradientSource(model, names)
    expected = oracles.gradients(model, batch, squares, list(names))
    return model, source, batch, expected


every_layer = pytest.mark.parametrize("case", LAYERS.values(), ids=LAYERS.keys())


@every_layer
@pytest.mark.filterwarnings("ignore:.*no gradient rule fits.*")
def test_gradients(case: LayerCase) -> None:
    _, source, batch, expected = captured(case)
    with source.attached():
        found = source(batch, Loss(squares, "none", "loss_fn"))
    assert_close(found.flat(), expected)
    assert set(source.capture.without_rule) == set(case.without_rule)


@every_layer
@pytest.mark.filterwarnings("ignore:.*no gradient rule fits.*")
def test_products(case: LayerCase) -> None:
    """Inner products, norms, sums, slices and joins of forms equal those of what they write out."""
    _, source, batch, expected = captured(case)
    n = len(expected)
    with source.attached():
        whole = source(batch, Loss(squares, "none", "loss_fn"))
    some = whole.rows(slice(1, 3))
    factors = torch.arange(1.0, n + 1, dtype=torch.float64)
    if n > 1:
        assert_close(whole.inner(some, n), expected[1:3] @ expected.T)
    others = whole.rows(slice(1, None, 2))
    assert (others.n, n // 2) == (len(expected[1::2]), others.n)
    if n > 1:
        assert_close(others.flat(), expected[1::2])
    total = expected.sum(0, keepdim=True) @ expected.T
    assert_close(whole.inner(whole.summed(), n), total)
    assert_close(whole.inner(whole.summed().plus(whole.summed()), n), 2 * total)
    assert_close(whole.squared_norms(), expected.square().sum(1))
    assert_close(whole.scaled(factors).flat(), factors[:, None] * expected)
    names = list(whole.parameters)
    # one sum, and so many that it is cheaper to write the gradients out
    for k in (1, 100):
        weights = torch.arange(1.0, k * n + 1, dtype=torch.float64).view(k, n)
        sums = whole.combined(weights, names)
        assert_close(torch.cat([sums[name] for name in names], dim=1), weights @ expected)


@every_layer
def test_a_layer_is_refused_or_right_in_float32(case: LayerCase) -> None:
    torch.manual_seed(0)
    model = case.build().float().eval()
    inputs = tuple(x.float() if x.is_floating_point() else x for x in case.inputs())
    batch = (*inputs, torch.zeros(len(inputs[0])))
    names = {name: p for name, p in model.named_parameters() if p.requires_grad}
    expected = oracles.gradients(model, batch, squares, list(names))
    source = GradientSource(model, names)
    with source.attached(), pytest.warns() if case.without_rule else _nothing():
        found = source(batch, Loss(squares, "none", "loss_fn"))
    assert_close(found.flat(), expected, relative=1e-4)


def _nothing() -> Any:
    import contextlib

    return contextlib.nullcontext()


def test_a_half_precision_model_is_computed_in_float32() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).bfloat16()
    batch = (torch.randn(N, 4).bfloat16(), torch.zeros(N))
    source = GradientSource(model, dict(model.named_parameters()))
    with source.attached():
        found = source(batch, Loss(squares, "none", "loss_fn"))
    expected = oracles.gradients(model, batch, squares).float()
    assert found.flat().dtype == torch.float32
    assert_close(found.flat(), expected, relative=2e-2)


def test_a_warning_names_what_has_no_rule_once() -> None:
    _, source, batch, _ = captured(LAYERS["bare parameter"])
    loss = Loss(squares, "none", "loss_fn")
    with source.attached():
        with pytest.warns(UserWarning, match="no gradient rule fits the parameters scale"):
            source(batch, loss)
        source(batch, Loss(squares, "none", "loss_fn"))  # a warning here is an error


@pytest.mark.parametrize(
    "layer",
    [nn.BatchNorm1d(4), nn.BatchNorm1d(4, track_running_stats=False)],
    ids=["training", "no running statistics"],
)
def test_batch_statistics_are_refused(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(4, 4), layer).double()
    if layer.running_mean is None:
        model.eval()
    source = GradientSource(model, dict(model.named_parameters()))
    batch = (torch.randn(N, 4).double(), torch.zeros(N))
    with source.attached(), pytest.raises(InvalidArgumentError, match=r"layer '1'.*eval_mode=True"):
        source(batch, Loss(squares, "none", "loss_fn"))


@pytest.mark.filterwarnings("ignore:.*no gradient rule fits.*")
def test_a_model_that_mixes_examples_is_refused() -> None:
    model = Apply(lambda m, x: m.a(x) - m.a(x).mean(0), a=nn.Linear(4, 3)).double()
    source = GradientSource(model, dict(model.named_parameters()))
    batch = (torch.randn(N, 4).double(), torch.zeros(N))
    with (
        source.attached(),
        pytest.raises(InvalidArgumentError, match="the model mixes the examples"),
    ):
        source(batch, Loss(squares, "none", "loss_fn"))


def test_dropout_in_training_mode_equals_autograd_with_the_same_mask() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double().train()
    batch = (torch.randn(N, 4).double(), torch.zeros(N))
    source = GradientSource(model, dict(model.named_parameters()))
    with source.attached():
        source(batch, Loss(squares, "none", "loss_fn"))
        torch.manual_seed(7)
        found = source(batch, next(iter(source._checked.values()))[0])
        torch.manual_seed(7)
        total = squares(model(batch[0]), batch[1]).sum()
        expected = torch.autograd.grad(total, list(model.parameters()))
    assert_close(found.flat().sum(0), torch.cat([g.flatten() for g in expected]))


def test_later_batches_keep_the_layout_that_was_checked() -> None:
    """Time-first inputs whose number of steps equals a later batch's number of examples."""
    model = LAYERS["time first"].build().double()
    source = GradientSource(model, dict(model.named_parameters()))
    loss = Loss(squares, "none", "loss_fn")
    for n in (N, 6, 1, 7):
        batch = (torch.randn(n, 6, 4).double(), torch.zeros(n))
        expected = oracles.gradients(model, batch, squares)
        with source.attached():
            assert_close(source(batch, loss).flat(), expected)
