"""Small whole models of the kinds that people train: what K-FAC and EK-FAC take in one call."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from cases import CLASSES, cross_entropy, token_cross_entropy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

VOCABULARY, T, WIDTH = 9, 4, 6


@dataclass(frozen=True)
class Whole:
    """A model, its data, and what is to be true of it.

    ``layers``: those with a Kronecker form, each with whether its bias joins its weight; ``forms``:
    what some blocks are said to have.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[int], Any]
    layers: Mapping[str, bool]
    forms: Mapping[str, str] = field(default_factory=dict)
    loss: Callable[[Any, Any], Tensor] = cross_entropy

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        model = self.build().double().eval()
        with torch.no_grad():
            for parameter in model.parameters():  # norms and biases start at ones and zeros
                parameter.add_(0.1 * torch.randn_like(parameter))
            for name, buffer in model.named_buffers():
                if "running" in name:
                    buffer.add_(0.3 * torch.rand_like(buffer))
        return model

    def data(self, n: int, seed: int) -> Any:
        torch.manual_seed(seed)
        return self.batch(n)


class Logits(nn.Module):
    """A model of the transformers package, called on ids alone."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: Tensor) -> Tensor:
        return self.inner(input_ids=ids).logits


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=T,
        n_embd=WIDTH,
        n_layer=2,
        n_head=2,
        n_inner=8,
        bos_token_id=None,
        eos_token_id=None,
    )
    return Logits(GPT2LMHeadModel(config))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=7,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=T,
    )
    return Logits(LlamaForCausalLM(config))


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=7,
        max_position_embeddings=T,
        num_labels=CLASSES,
    )
    return Logits(BertForSequenceClassification(config))


class Encoder(nn.Module):
    """torch's own transformer: its attention has parameters that no linear layer owns."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 7, dropout=0.1, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.words(ids)).mean(1))


class Residual(nn.Module):
    """A block of a ResNet, with a shortcut of its own, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4)
        self.shortcut = nn.Sequential(nn.Conv2d(2, 4, 1, 2, bias=False), nn.BatchNorm2d(4))
        self.relu, self.fc = nn.ReLU(inplace=True), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.fc(self.relu(out + self.shortcut(x)).mean((2, 3)))


class Decoder(nn.Module):
    """Transposed convolutions, of large maps and of small ones."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.tiny = nn.ConvTranspose2d(2, 3, 2, 2), nn.ConvTranspose2d(6, 2, 2)
        self.head = nn.Linear(3 + 2, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x).tanh().mean((2, 3))
        tiny = self.tiny(x.reshape(len(x), 6, 1, -1)[..., :1]).tanh().square().mean((2, 3))
        return self.head(torch.cat([up, tiny], dim=1))


class Recurrent(nn.Module):
    """Recurrent layers, whose weights are used once for each step."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, 4)
        self.lstm, self.gru = nn.LSTM(4, 3, batch_first=True), nn.GRU(3, 3, batch_first=True)
        self.head = nn.Linear(3, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.gru(self.lstm(self.words(ids))[0])[0][:, -1])


class Bare(nn.Module):
    """Parameters of the model itself, in a list, under a parametrization, and shared."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.matrix = nn.Parameter(torch.ones(4)), nn.Parameter(torch.eye(4))
        self.steps = nn.ParameterList([torch.ones(4), torch.zeros(4)])
        self.normed = weight_norm(nn.Linear(4, 4))
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.bias = self.first.bias
        self.norm, self.head = nn.GroupNorm(2, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = (x @ self.matrix * self.scale + self.steps[0] * self.steps[1]).tanh()
        x = self.second(self.first(self.normed(x)).tanh())
        return self.head(self.norm(x.tanh()))


class Routed(nn.Module):
    """Takes another layer for examples whose first number is positive; one layer is never used.

    The bias of ``one`` is used once more in the batches that have such examples.
    """

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.spare = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(2, 2)
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        late = x[:, :1] > 0
        out = self.one(x).tanh()
        if bool(late.any()):
            out = torch.where(late, self.norm(self.other(x)) * 2, out)
        return self.head(out)


class Lent(nn.Module):
    """A bias and a table that some batches use in another layer, too."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.first, self.second = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.out = nn.Linear(4, 9, bias=False)
        self.second.bias, self.out.weight = self.first.bias, self.words.weight
        self.head = nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        out = self.first(self.words(ids).mean(1)).tanh()
        late = ids[:, :1] > 4
        if bool(late.any()):
            other = self.second(self.out(out)[:, :4].tanh())
            out = torch.where(late, other, out)
        return self.head(out)


def tokens(n: int) -> Any:
    ids = torch.randint(0, VOCABULARY, (n, T + 1))
    return ids[:, :-1], ids[:, 1:]


def padded_tokens(n: int) -> Any:
    ids, targets = tokens(n)
    lengths = T - torch.arange(n) % 3
    return ids, targets.masked_fill(torch.arange(T) >= lengths[:, None], -100)


def words(n: int) -> Any:
    return torch.randint(1, VOCABULARY, (n, T)), torch.arange(n) % CLASSES


def images(n: int) -> Any:
    return torch.randn(n, 2, 10, 10).double(), torch.arange(n) % CLASSES


def small_images(n: int) -> Any:
    return torch.randn(n, 2, 6, 6).double(), torch.arange(n) % CLASSES


def routed(n: int, first: int = 6) -> Any:
    """The first so many examples, half of few, take the first layer alone."""
    x, y = vectors(n)
    x[:, 0] = x[:, 0].abs() * torch.where(torch.arange(n) < min(first, n // 2), -1, 1)
    return x, y


def lent(n: int) -> Any:
    ids, y = words(n)
    ids[:, 0] = torch.where(torch.arange(n) < min(6, n // 2), 2, 7)
    return ids, y


def vectors(n: int) -> Any:
    return torch.randn(n, 4).double(), torch.arange(n) % CLASSES


def masked_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.transpose(1, 2), targets, reduction="none", ignore_index=-100)


def _inside(prefix: str, names: str, joins: bool = True) -> dict[str, bool]:
    return {f"{prefix}.{name}": joins for name in names.split()}


_H = "inner.transformer.h"
_L = "inner.model.layers.0"
_B = "inner.bert.encoder.layer.0"
GPT2_LAYERS = {
    "inner.transformer.wpe": False,
    **_inside(f"{_H}.0", "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj"),
    **_inside(f"{_H}.1", "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj"),
}
LLAMA_LAYERS = {
    "inner.model.embed_tokens": False,
    **_inside(f"{_L}.self_attn", "q_proj k_proj v_proj o_proj", joins=False),
    **_inside(f"{_L}.mlp", "gate_proj up_proj down_proj", joins=False),
    "inner.lm_head": False,
}
BERT_LAYERS = {
    **_inside(
        "inner.bert.embeddings",
        "word_embeddings position_embeddings token_type_embeddings",
        joins=False,
    ),
    **_inside(f"{_B}.attention", "self.query self.key self.value output.dense"),
    **_inside(_B, "intermediate.dense output.dense"),
    **_inside("inner", "bert.pooler.dense classifier"),
}

WHOLE = {
    "gpt2": Whole(
        gpt2,
        tokens,
        GPT2_LAYERS,
        {"inner.transformer.wte": "diagonal", f"{_H}.0.ln_1": "diagonal"},
        token_cross_entropy,
    ),
    "llama": Whole(
        llama, padded_tokens, LLAMA_LAYERS, {"inner.model.norm": "diagonal"}, masked_cross_entropy
    ),
    "bert": Whole(bert, words, BERT_LAYERS, {f"{_B}.output.LayerNorm": "diagonal"}),
    "encoder": Whole(
        Encoder,
        words,
        {
            "words": False,
            **_inside("body.layers.0", "linear1 linear2"),
            "head": True,
        },
        {"body.layers.0.self_attn": "diagonal", "body.layers.0.self_attn.out_proj": "diagonal"},
    ),
    "resnet": Whole(
        Residual,
        images,
        {"conv1": False, "conv2": False, "shortcut.0": False, "fc": True},
        {"bn1": "diagonal", "shortcut.1": "diagonal"},
    ),
    "decoder": Whole(
        Decoder,
        small_images,
        {"up": False, "tiny": False, "head": True},
        {"up": "weight: Kronecker; bias: diagonal", "tiny": "weight: Kronecker; bias: diagonal"},
    ),
    "recurrent": Whole(
        Recurrent, words, {"words": False, "head": True}, {"lstm": "diagonal", "gru": "diagonal"}
    ),
    "bare": Whole(
        Bare,
        vectors,
        {"first": False, "second": False, "head": True},
        {
            "scale": "diagonal",
            "steps": "diagonal",
            "normed.parametrizations.weight": "diagonal",
            "normed": "diagonal",
            "first": "weight: Kronecker; bias: diagonal",
        },
    ),
}
# whose layers do not all take part in every batch of six
ROUTED = {
    "routed": Whole(
        Routed,
        routed,
        {"one": True, "other": True, "head": True},
        {"norm": "diagonal", "spare": "diagonal (zero)"},
    ),
    "lent": Whole(
        Lent,
        lent,
        {"first": False, "second": False, "head": True},
        {"words": "diagonal", "first": "weight: Kronecker; bias: diagonal"},
    ),
}
