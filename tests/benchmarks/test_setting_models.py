"""The models of the settings, against formulas written out and against transformers."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import influence_kit
from benchmarks.settings.losses import class_losses, closeness, log_likelihoods, token_losses
from benchmarks.settings.models.gpt2 import new_gpt2, pretrained_gpt2
from benchmarks.settings.models.perceptrons import linear, perceptron
from benchmarks.settings.models.resnet9 import resnet9
from benchmarks.settings.models.transformer import (
    GPT,
    MusicTransformer,
    RelativeAttention,
    sinusoids,
    skewed,
)

TOKENS, CONTEXT = 11, 6


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def small_gpt(tied: bool = True, dropout: float = 0.0) -> GPT:
    return GPT(TOKENS, CONTEXT, layers=2, width=8, heads=2, dropout=dropout, tied=tied).double()


def small_music_transformer(dropout: float = 0.0) -> MusicTransformer:
    model = MusicTransformer(TOKENS, CONTEXT, 2, width=8, heads=2, hidden=12, dropout=dropout)
    return model.double()


def small_gpt2() -> nn.Module:
    config = {"n_positions": CONTEXT, "n_embd": 8, "n_layer": 2, "n_head": 2}
    return new_gpt2(TOKENS, bos_token_id=0, eos_token_id=0, **config).double()


SEQUENCE_MODELS = {
    "gpt": small_gpt,
    "untied gpt": lambda: small_gpt(tied=False),
    "music transformer": small_music_transformer,
    "gpt2": small_gpt2,
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def ids(n: int, t: int = CONTEXT) -> Tensor:
    return torch.randint(0, TOKENS, (n, t))


def test_sizes_are_those_of_the_literature():
    assert count(linear(784, 10)) == 7850
    assert count(perceptron((784, 128, 64, 10), dropout=0.1)) == 109_386
    assert count(perceptron((64, 64, 32, 10))) == 6570
    assert count(resnet9(10)) == 2_274_880


def test_a_perceptron_has_dropout_after_each_relu():
    kinds = [type(layer).__name__ for layer in perceptron((4, 3, 3, 2), dropout=0.1)]
    hidden = ["Linear", "ReLU", "Dropout"]
    assert kinds == ["Flatten", *hidden, *hidden, "Linear"]
    assert "Dropout" not in {type(layer).__name__ for layer in perceptron((4, 3, 2))}


def test_images_are_flattened():
    assert linear(12, 2)(torch.randn(5, 3, 2, 2)).shape == (5, 2)


def test_resnet9_is_its_formula():
    model = resnet9(3, width=2).double().eval()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)

    def block(part, x, **how):
        conv, norm = part[0], part[1]
        return norm(F.conv2d(x, conv.weight, **how)).relu()

    h = block(model[0], x, padding=1)
    h = block(model[1], h, stride=2, padding=2)
    h = h + block(model[2][1], block(model[2][0], h, padding=1), padding=1)
    h = F.max_pool2d(block(model[3], h, padding=1), 2)
    h = h + block(model[5][1], block(model[5][0], h, padding=1), padding=1)
    h = block(model[6], h).amax((2, 3))
    assert torch.allclose(model(x), 0.2 * h @ model[10].weight.T)


def test_skewing_moves_products_to_their_distances():
    products = torch.randn(3, 5, 5)
    moved = skewed(products)
    for i in range(5):
        for j in range(i + 1):
            assert torch.equal(moved[:, i, j], products[:, i, 4 - (i - j)])


@pytest.mark.parametrize("t", [CONTEXT, 3, 1])
def test_relative_attention_is_its_formula(t):
    heads, width = 2, 8
    layer = RelativeAttention(width, heads, CONTEXT).double()
    x = torch.randn(2, t, width, dtype=torch.float64)
    q, k, v = layer.qkv(x).chunk(3, -1)
    expected = torch.zeros(2, t, width, dtype=torch.float64)
    for head in range(heads):
        own = slice(4 * head, 4 * head + 4)
        for i in range(t):
            logits = [
                (q[:, i, own] * (k[:, j, own] + layer.distances.weight[i - j, own])).sum(-1)
                for j in range(i + 1)
            ]
            weights = (torch.stack(logits, -1) / 2).softmax(-1)
            expected[:, i, own] = (weights[..., None] * v[:, : i + 1, own]).sum(1)
    assert torch.allclose(layer(x), layer.out(expected))


def test_sinusoids_are_those_of_the_original_transformer():
    table = sinusoids(5, 6)
    for position in range(5):
        for pair in range(3):
            angle = position / 10000 ** (2 * pair / 6)
            assert table[position, 2 * pair].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[position, 2 * pair + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_the_gpt_is_gpt2_with_other_names():
    transformers = pytest.importorskip("transformers")
    own = small_gpt().eval()
    config = transformers.GPT2Config(
        vocab_size=TOKENS,
        n_positions=CONTEXT,
        n_embd=8,
        n_layer=2,
        n_head=2,
        activation_function="gelu",
        bos_token_id=0,
        eos_token_id=0,
    )
    other = transformers.GPT2LMHeadModel(config).double().eval()
    body = other.transformer
    body.wte.weight.data = own.tokens.weight.data
    body.wpe.weight.data = own.positions.weight.data
    body.ln_f.load_state_dict(own.norm.state_dict())
    for mine, theirs in zip(own.blocks, body.h, strict=True):
        theirs.ln_1.load_state_dict(mine.norm1.state_dict())
        theirs.ln_2.load_state_dict(mine.norm2.state_dict())
        for layer, conv in (
            (mine.attention.qkv, theirs.attn.c_attn),
            (mine.attention.out, theirs.attn.c_proj),
            (mine.up, theirs.mlp.c_fc),
            (mine.down, theirs.mlp.c_proj),
        ):
            nn.init.normal_(layer.bias)
            conv.weight.data, conv.bias.data = layer.weight.data.T, layer.bias.data
    x = ids(3)
    assert torch.allclose(own(x), other(x).logits)


def test_a_tied_head_is_the_embedding():
    model = small_gpt()
    assert model.head.weight is model.tokens.weight
    assert count(small_gpt(tied=False)) == count(model) + TOKENS * 8


@pytest.mark.parametrize("kind", SEQUENCE_MODELS)
def test_logits_do_not_look_ahead(kind):
    model = SEQUENCE_MODELS[kind]().eval()
    x = ids(2)
    changed = x.clone()
    changed[:, 4:] = (changed[:, 4:] + 1) % TOKENS
    before, after = model(x), model(changed)
    assert before.shape == (2, CONTEXT, TOKENS)
    assert torch.allclose(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


@pytest.mark.parametrize("build", [small_gpt, small_music_transformer])
def test_dropout_is_off_in_evaluation(build):
    model = build(dropout=0.5)
    x = ids(2)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def gradients_one_by_one(model, batch, loss_fn) -> Tensor:
    rows = []
    for place in range(len(batch[0])):
        one = tuple(tensor[place : place + 1] for tensor in batch)
        loss = loss_fn(model(one[0]), one[1]).sum()
        found = torch.autograd.grad(loss, list(model.parameters()))
        rows.append(torch.cat([gradient.flatten() for gradient in found]))
    return torch.stack(rows)


def images() -> tuple[Tensor, Tensor]:
    return torch.randn(3, 3, 32, 32, dtype=torch.float64), torch.arange(3) % 2


def sequences() -> tuple[Tensor, Tensor]:
    x, y = ids(3), ids(3)
    y[1, 3:] = -100
    return x, y


@pytest.mark.parametrize(
    ("build", "batch", "loss_fn"),
    [
        pytest.param(lambda: resnet9(2, width=2).double(), images, class_losses, id="resnet9"),
        *(
            pytest.param(build, sequences, token_losses, id=name)
            for name, build in SEQUENCE_MODELS.items()
        ),
    ],
)
def test_influence_kit_attributes_to_it(build, batch, loss_fn, unchanged):
    model = build().eval()
    data = batch()
    expected = gradients_one_by_one(model, data, loss_fn)
    method = influence_kit.GradDot(
        model, TensorDataset(*data), [model.state_dict()], loss_fn=loss_fn
    )
    with unchanged(model):
        scores = method.influence(data)
    assert torch.allclose(scores, expected @ expected.T)


@pytest.mark.parametrize("inside", ["", "gpt2"])
def test_pretrained_gpt2_is_read_from_a_folder(tmp_path, inside):
    model = small_gpt2().eval()
    model.network.save_pretrained(tmp_path / inside)
    again = pretrained_gpt2(tmp_path).double().eval()
    x = ids(2)
    assert torch.allclose(again(x), model(x), atol=1e-6)
    (tmp_path / inside / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"GPT-2's weights: .* no model.safetensors or"):
        pretrained_gpt2(tmp_path)
    (tmp_path / inside / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"GPT-2's configuration: .* has no config.json"):
        pretrained_gpt2(tmp_path)


def test_token_losses_are_means_over_what_is_labelled():
    logits, (_, targets) = torch.randn(3, CONTEXT, TOKENS), sequences()
    expected = []
    for place in range(3):
        kept = targets[place] >= 0
        p = logits[place, kept].softmax(-1)
        expected.append(-p[torch.arange(int(kept.sum())), targets[place, kept]].log().mean())
    assert torch.allclose(token_losses(logits, targets), torch.stack(expected))
    assert torch.equal(log_likelihoods(logits, targets), -token_losses(logits, targets))


def test_closeness_is_minus_half_the_squared_error():
    predictions, targets = torch.tensor([[1.0], [3.0]]), torch.tensor([[2.0], [0.0]])
    assert closeness(predictions, targets).tolist() == [-0.5, -4.5]
