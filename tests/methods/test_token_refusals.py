"""What has no scores by token is an error that says what to do."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Examples
from token_models import WIDTH, T, adapted, terms, tokens, total
from torch import Tensor, nn
from torch.nn import functional as F

import influence_kit as ik
from influence_kit.errors import InvalidArgumentError, NonFiniteError
from influence_kit.gradients import Dense, gradient_rule
from influence_kit.scoring import token_results

TRAIN, TEST = tokens(7, 1), tokens(3, 2)
SIDES = ("train", "test_positions", "test_terms")


def dots(model: nn.Module, loss: Callable[..., Tensor] = terms, **more: Any) -> ik.GradDot:
    return ik.GradDot(model, Examples(TRAIN), [model.state_dict()], loss_fn=loss, **more)


@pytest.mark.parametrize("value", ["tokens", True, 1, ""])
def test_other_values(value: Any) -> None:
    with pytest.raises(InvalidArgumentError, match='`per_token` must be "train", "test_positions"'):
        dots(adapted()).influence(TEST, per_token=value)


def test_sums_of_test_examples_have_no_test_tokens() -> None:
    with pytest.raises(InvalidArgumentError, match="aggregate=True sums the test examples"):
        dots(adapted()).influence(TEST, aggregate=True, per_token="test_positions")


@pytest.mark.parametrize(
    ("documents", "per_token", "message"),
    [
        (torch.zeros(7, T).long(), None, '`doc_ids` needs per_token="train"'),
        (torch.zeros(7, T).long(), "test_terms", "`doc_ids` are of training tokens"),
        (torch.zeros(7, T), "train", "`doc_ids` must be whole numbers"),
        (torch.tensor(3), "train", "`doc_ids` must be whole numbers"),
        ([[0] * T] * 7, "train", "`doc_ids` must be whole numbers"),
        (3, "train", "`doc_ids` must be whole numbers"),
        ([], "train", "`doc_ids` is empty"),
        (torch.zeros(6, T).long(), "train", "has 6 rows, and the training set has more"),
        (torch.zeros(8, T).long(), "train", "has 8 rows for 7 training examples"),
        (torch.full((7, T), 2**62), "train", "`doc_ids` holds 4611686018427387904, so"),
        (torch.zeros(7, T + 1).long(), "train", "has 6 tokens for training example 0, which has 5"),
    ],
)
def test_documents(documents: Any, per_token: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        dots(adapted()).influence(TEST, per_token=per_token, doc_ids=documents)


def test_too_many_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_results, "free_bytes", lambda device: 0)
    monkeypatch.setattr(token_results, "MIB", 10)
    with pytest.raises(InvalidArgumentError, match=r"\[3, 7, 5\] take .* MiB.*pass `k`"):
        dots(adapted()).influence(TEST, per_token="train")
    assert dots(adapted()).influence(TEST, k=2, per_token="train").token_scores.shape == (3, 2, T)


class Wrapped(nn.Module):
    """A part in front of the model, on its embeddings."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.inner, self.part = adapted(), part.double()

    def forward(self, ids: Tensor) -> Tensor:
        return self.inner.head(self.part(self.inner.tokens(ids)))


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


class OverTime(nn.Module):
    """A convolution along the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


class Pooled(nn.Module):
    """A layer of the mean over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.more = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.more(x) * self.gate(x.mean(1))[:, None]


class OfPairs(nn.Module):
    """A layer of all pairs of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.pair(x[:, :, None] * x[:, None]).sum(2)


class Centred(nn.Module):
    """Its rule is right for whole examples, and wrong for single positions."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * (x - x.mean(1, keepdim=True))


class Strict(Centred):
    """Its rule fails for single positions."""


class OfAll(nn.Module):
    """A norm over tokens and entries together."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm((T, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class Gate(nn.Module):
    """Called with what all tokens share, too."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor, mean: Tensor) -> Tensor:
        return self.factor * x * mean


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = Gate()

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x, x.mean(1, keepdim=True))


@gradient_rule(Gate)
def gate(layer: Gate, inputs: Any, delta: Tensor, n: int) -> dict[str, Dense]:
    products = delta * inputs[0] * inputs[1]
    return {"factor": Dense(products.reshape(n, -1, WIDTH).sum(1), layer.factor.shape)}


@gradient_rule(Centred)
def centred(layer: Centred, inputs: Any, delta: Tensor, n: int) -> dict[str, Dense]:
    if isinstance(layer, Strict) and inputs[0].dim() < 3:
        raise RuntimeError("needs [n, t, d]")
    x = inputs[0].reshape(n, -1, WIDTH)
    products = delta.reshape(n, -1, WIDTH) * (x - x.mean(1, keepdim=True))
    return {"factor": Dense(products.sum(1), layer.factor.shape)}


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (Bare, "parameters part.factor have no gradient per position .*name the layers.*`layers`"),
        (OverTime, "parameters part.conv.bias, part.conv.weight are of a convolution"),
        (Pooled, "most layers act at 5 positions .* part.gate.bias, part.gate.weight at 1"),
        (OfPairs, "part.pair.* two dimensions may count tokens"),
        (Centred, r"part.factor \(of a Centred\) have no gradient per position"),
        (Strict, r"part.factor \(of a Strict\) have no gradient per position"),
        (Gated, r"part.gate.factor \(of a Gate\) have no gradient per position"),
        (OfAll, "most layers act at 5 positions .* part.norm.bias, part.norm.weight at 1"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*no gradient rule fits.*")
def test_parameters_without_positions(part: Callable[[], nn.Module], message: str) -> None:
    torch.manual_seed(0)
    model = Wrapped(part())
    for side in ("train", "test_positions"):
        with pytest.raises(InvalidArgumentError, match=message):
            dots(model).influence(TEST, per_token=side)
    some = dots(model, layers=["inner"])
    for side in SIDES:
        found = some.influence(TEST, per_token=side)
        assert torch.allclose(found.sum(2), some.influence(TEST), atol=1e-10)
    # terms of the loss need no positions
    whole = dots(model)
    found = whole.influence(TEST, per_token="test_terms")
    assert torch.allclose(found.sum(2), whole.influence(TEST), atol=1e-10)


def test_losses_without_terms() -> None:
    with pytest.raises(InvalidArgumentError, match=r"returned a tensor of shape \[3\], which does"):
        dots(adapted(), total).influence(TEST, per_token="test_terms")


class Declared:
    """A loss whose method ``terms`` returns what it is given."""

    def __init__(self, of_terms: Callable[..., Any]) -> None:
        self.of_terms = of_terms

    def __call__(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return total(outputs, labels)

    def terms(self, outputs: Tensor, labels: Tensor) -> Any:
        return self.of_terms(outputs, labels)


def test_wrong_terms() -> None:
    wrong = Declared(lambda outputs, labels: 2 * terms(outputs, labels))
    with pytest.raises(InvalidArgumentError, match="the terms of `loss_fn` sum to"):
        dots(adapted(), wrong).influence(TEST, per_token="test_terms")
    for shape in (total, lambda outputs, labels: 3):
        with pytest.raises(
            InvalidArgumentError, match=r"`terms` of `loss_fn` must return \[n, t\]"
        ):
            dots(adapted(), Declared(shape)).influence(TEST, per_token="test_terms")


@pytest.mark.parametrize("side", SIDES)
def test_gradients_that_are_not_finite(side: str) -> None:
    def broken(outputs: Tensor, labels: Tensor) -> Tensor:
        return terms(outputs, labels) * torch.where(labels[:, :1] == 3, torch.nan, 1.0)

    train, test = (TRAIN[0], TRAIN[1].clamp(max=2)), (TEST[0], TEST[1].clamp(max=2))
    model = adapted()

    def made(data: Any) -> ik.GradDot:
        return ik.GradDot(model, Examples(data), [model.state_dict()], loss_fn=broken, batch_size=7)

    spoilt = train[0], train[1].clone()
    spoilt[1][4, 0] = 3
    with pytest.raises(NonFiniteError, match="the gradient of training example 4 at"):
        made(spoilt).influence(test, per_token=side)
    other = test[0], test[1].clone()
    other[1][1, 0] = 3
    with pytest.raises(NonFiniteError, match="the gradient of test example 1 at"):
        made(train).influence(other, per_token=side)


@pytest.mark.parametrize("side", SIDES)
def test_scores_that_overflow(side: str) -> None:
    def large(outputs: Tensor, labels: Tensor) -> Tensor:
        return 1e30 * F.cross_entropy(outputs.transpose(1, 2), labels, reduction="none")

    model = adapted().float()
    method = ik.GradDot(model, Examples(TRAIN), [model.state_dict()], loss_fn=large)
    with pytest.raises(NonFiniteError, match=r"a token score .* overflows at checkpoint 0"):
        method.influence(TEST, per_token=side)
