"""What labels say of the number of observations, against all labels that there are."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from influence_kit.gradients.forms import Dense
from influence_kit.gradients.per_example import Gradients
from influence_kit.labels import with_logits
from influence_kit.losses import Loss
from influence_kit.operators.labels import ModelLabels
from influence_kit.operators.observations import LabelFacts, Tally
from influence_kit.own_losses import example_means, next_token_losses

C, T, N = 3, 4, 7


class Outputs(nn.Module):
    """A model whose outputs are its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones(()).double())

    def forward(self, logits: Tensor) -> Tensor:
        return logits * self.one.to(logits)


class Named(Outputs):
    def forward(self, logits: Tensor) -> Any:
        return {"logits": super().forward(logits)}


@dataclass(frozen=True)
class Kind:
    """A loss, and what is to be true of it.

    ``factor``: of each label, what it is multiplied by against the negative log-likelihood, given
    the labels of an example (0 of one that counts nothing); ``options``: all labels of one
    position with their probabilities, given its logits.
    """

    loss: Any
    batch: Callable[[int], Any]
    factor: Callable[[Tensor], Tensor]
    options: Callable[[Tensor], list[tuple[float, float]]]
    reduction: str = "none"
    model: type[Outputs] = Outputs
    axis: int | None = -1
    precision: float | None = None

    def total(self, outputs: Any, batch: Any) -> Tensor:
        """The loss of one example."""
        return self.known.total(outputs, batch, 1)

    @property
    def known(self) -> Loss:
        return Loss(self.loss, self.reduction, "loss_fn")


def classes(logits: Tensor) -> list[tuple[float, float]]:
    return list(enumerate(logits.softmax(0).tolist()))


def bits(logit: Tensor) -> list[tuple[float, float]]:
    p = float(logit.sigmoid())
    return [(0.0, 1 - p), (1.0, p)]


def numbers(precision: float, logit: Tensor) -> list[tuple[float, float]]:
    """The three points of Gauss and Hermite, exact for squares of slopes."""
    step = math.sqrt(3 / precision)
    return [(float(logit) + k * step, weight) for k, weight in ((0, 2 / 3), (1, 1 / 6), (-1, 1 / 6))]


def of_classes(n: int) -> Any:
    return 2 * torch.randn(n, C).double(), torch.randint(0, C, (n,))


def of_tokens(n: int, classes_first: bool = False) -> Any:
    """Sequences of several lengths, the first of them without any label that counts."""
    logits, labels = 2 * torch.randn(n, T, C).double(), torch.randint(0, C, (n, T))
    lengths = torch.arange(n) % (T + 1)
    labels[torch.arange(T) >= lengths[:, None]] = -100
    return (logits.transpose(1, 2) if classes_first else logits), labels


def of_next_tokens(n: int) -> Any:
    logits, labels = of_tokens(n)
    return {"logits": logits, "labels": labels}


def of_bits(n: int) -> Any:
    return 2 * torch.randn(n, C).double(), torch.randint(0, 2, (n, C)).double()


def of_numbers(n: int) -> Any:
    return torch.randn(n, C).double(), torch.randn(n, C).double()


def token_losses(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.transpose(1, 2), targets, reduction="none")


def token_means(outputs: Tensor, targets: Tensor) -> Tensor:
    return token_losses(outputs, targets).sum(1) / (targets >= 0).sum(1).clamp(min=1)


def times(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda labels: factor * (labels > -100).double()


def over_count(labels: Tensor, shift: int = 0) -> Tensor:
    kept = (labels > -100).double()
    kept[:shift] = 0
    return kept / kept.sum().clamp(min=1)


def squares(factor: float) -> Any:
    return lambda outputs, targets: factor * (outputs - targets).square()


def normal(loss: Any, precision: float, reduction: str = "none") -> Kind:
    own = {"axis": None, "precision": precision}
    return Kind(loss, of_numbers, times(precision), partial(numbers, precision), reduction, **own)


def sigmoid(reduction: str, factor: float) -> Kind:
    loss = nn.BCEWithLogitsLoss(reduction=reduction)
    return Kind(loss, of_bits, times(factor), bits, reduction, axis=None)


KINDS = {
    **{
        f"classes, {how}": Kind(
            nn.CrossEntropyLoss(reduction=how), of_classes, times(1.0), classes, how
        )
        for how in ("none", "sum", "mean")
    },
    "classes, times 10": Kind(
        lambda o, t: 10 * F.cross_entropy(o, t, reduction="none"), of_classes, times(10.0), classes
    ),
    "tokens": Kind(token_losses, of_tokens, times(1.0), classes),
    "tokens, classes first": Kind(
        nn.CrossEntropyLoss(reduction="none"),
        partial(of_tokens, classes_first=True),
        times(1.0),
        classes,
        axis=1,
    ),
    "tokens, mean": Kind(token_means, of_tokens, over_count, classes),
    "next tokens": Kind(
        partial(example_means, next_token_losses),
        of_next_tokens,
        partial(over_count, shift=1),
        classes,
        model=Named,
    ),
    "bits": sigmoid("none", 1.0),
    "bits, sum": sigmoid("sum", 1.0),
    "bits, mean": sigmoid("mean", 1 / C),
    "half squares": normal(squares(0.5), 1.0),
    "squares": normal(nn.MSELoss(reduction="none"), 2.0),
    "squares, sum": normal(nn.MSELoss(reduction="sum"), 2.0, "sum"),
    "squares, mean": normal(nn.MSELoss(), 2 / C, "mean"),
    "squares, times 10": normal(squares(10.0), 20.0),
}
every_kind = pytest.mark.parametrize("name", KINDS)


# The oracle: single examples, all labels.


def parts(kind: Kind, batch: Any) -> tuple[Tensor, Tensor]:
    return (batch["logits"], batch["labels"]) if isinstance(batch, dict) else batch


def joined(kind: Kind, logits: Tensor, labels: Tensor) -> tuple[Any, Any]:
    """Outputs and the batch of one example."""
    if kind.model is Named:
        return {"logits": logits[None]}, {"logits": logits[None], "labels": labels[None]}
    return logits[None], (logits[None], labels[None])


def squared_slope(kind: Kind, logits: Tensor, labels: Tensor) -> float:
    outputs, batch = joined(kind, logits, labels)
    leaf = logits[None].detach().requires_grad_()
    total = kind.total(with_logits(outputs, leaf), batch)
    return float(torch.autograd.grad(total, leaf)[0].square().sum())


def expected_square(kind: Kind, logits: Tensor, labels: Tensor) -> float:
    """The mean of the squared slope over all combinations of labels that count."""
    factors = kind.factor(labels)
    shift = int(kind.model is Named)
    rows = logits if kind.axis != 1 or labels.dim() == 0 else logits.T
    rows = rows.reshape(-1, C) if kind.axis is not None else rows
    kept = [i for i, factor in enumerate(factors.reshape(-1).tolist()) if factor]
    choices = [kind.options(rows[i - shift]) for i in kept]
    total = 0.0
    for combination in itertools.product(*choices):
        own = labels.clone().reshape(-1)
        for i, (label, _) in zip(kept, combination, strict=True):
            own[i] = label
        probability = math.prod(p for _, p in combination)
        total += probability * squared_slope(kind, logits, own.view(labels.shape))
    return total


def facts_of(kind: Kind, given: Any, drawn: Any) -> dict[str, Any]:
    """Of drawn labels, where those of the data are ``given``."""
    (logits, of_data), (_, labels) = parts(kind, given), parts(kind, drawn)
    factors = torch.stack([kind.factor(own).double() for own in of_data])
    weights = []
    for z, data, own in zip(logits, of_data, labels, strict=True):
        seen = squared_slope(kind, z, own)
        weights.append(expected_square(kind, z, data) / seen if seen else 0.0)
    residuals = None
    if kind.precision is not None:
        residuals = kind.precision * float((logits - of_data).square().sum())
    return {
        "labels": int((factors > 0).sum()),
        "squares": float(factors.square().sum()),
        "residuals": residuals,
        "weights": torch.tensor(weights, dtype=torch.float64),
    }


def assert_facts(found: LabelFacts, expected: dict[str, Any], close: float = 1e-9) -> None:
    assert int(found.labels) == expected["labels"]
    assert float(found.squares) == pytest.approx(expected["squares"], rel=close)
    if expected["residuals"] is None:
        assert found.residuals is None
    else:
        assert float(found.residuals) == pytest.approx(expected["residuals"], rel=close)
    torch.testing.assert_close(found.weights, expected["weights"], rtol=close, atol=0)


def setting(name: str) -> tuple[Kind, Any, ModelLabels]:
    kind = KINDS[name]
    torch.manual_seed(1)
    batch = kind.batch(N)
    return kind, batch, ModelLabels(kind.model(), kind.known, 3)


# Facts of labels.


@every_kind
def test_drawn_labels(name: str) -> None:
    kind, batch, labels = setting(name)
    drawn, facts = labels.drawn(torch.arange(N), batch)
    assert not torch.equal(parts(kind, drawn)[1], parts(kind, batch)[1])
    assert_facts(facts, facts_of(kind, batch, drawn))
    assert facts.weights.std() > 0.01, "weights that are alike tell nothing"


@every_kind
def test_labels_of_the_data(name: str) -> None:
    """Their gradients stand for no others."""
    kind, batch, labels = setting(name)
    facts = labels.given(torch.arange(N), batch)
    assert facts is not None
    expected = facts_of(kind, batch, batch) | {"weights": torch.ones(N).double()}
    assert_facts(facts, expected)


@every_kind
def test_weights_are_one_on_average_over_drawn_labels_times_their_squares(name: str) -> None:
    """E[weight * squared slope] is the expected squared slope, whatever was drawn."""
    kind, batch, labels = setting(name)
    logits, of_data = parts(kind, batch)
    expected = [expected_square(kind, z, own) for z, own in zip(logits, of_data, strict=True)]
    for seed in range(3):
        labels.seed = seed
        drawn, facts = labels.drawn(torch.arange(N), batch)
        own = parts(kind, drawn)[1]
        seen = [squared_slope(kind, z, y) for z, y in zip(logits, own, strict=True)]
        found = facts.weights * torch.tensor(seen, dtype=torch.float64)
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["classes, none", "tokens, mean", "bits", "next tokens"])
@pytest.mark.parametrize("scale", [10.0, 40.0, 100.0, 1e4])
def test_saturated_logits_have_finite_weights(name: str, dtype: torch.dtype, scale: float) -> None:
    """Where every other label's probability rounds to nothing, nothing stands for others."""
    kind, batch, labels = setting(name)
    logits, of_data = parts(kind, batch)
    # the label of the data is the sure one
    shift = int(kind.model is Named)
    sure = torch.zeros_like(logits)
    if kind.axis is None:
        sure = of_data * 2 - 1
    else:
        targets = of_data.clamp(min=0).roll(-shift, -1) if shift else of_data.clamp(min=0)
        sure.scatter_(-1, targets.unsqueeze(-1), 1.0)
    sure = ((sure + 1e-3 * logits) * scale).to(dtype)
    batch = {"logits": sure, "labels": of_data} if shift else (sure, of_data.to(batch[1].dtype))
    if kind.axis is None:
        batch = (sure, of_data.to(dtype))
    with torch.no_grad():
        labels._known(torch.arange(N), {"logits": logits, "labels": of_data} if shift else (logits, of_data))
    drawn, facts = labels.drawn(torch.arange(N), batch)
    assert bool(torch.isfinite(facts.weights).all())
    assert bool((facts.weights >= 0).all())
    assert math.isfinite(float(facts.squares))
    if scale == 40.0 and dtype == torch.float64:
        expected = facts_of(kind, batch, drawn)
        torch.testing.assert_close(facts.weights, expected["weights"], rtol=1e-6, atol=0)
        assert facts.weights.max() > 1e10
