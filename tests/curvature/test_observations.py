"""What labels say of the number of observations, against all labels that there are."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from influence_kit.curvature.model_labels import ModelLabels
from torch import Tensor, nn
from torch.nn import functional as F

from influence_kit.curvature.observations import LabelStatistics, Tally
from influence_kit.data.class_labels import with_logits
from influence_kit.gradients.forms import Dense
from influence_kit.gradients.per_example import Gradients
from influence_kit.losses.loss import Loss
from influence_kit.losses.model_losses import example_means, next_token_losses

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
    return [
        (float(logit) + k * step, weight) for k, weight in ((0, 2 / 3), (1, 1 / 6), (-1, 1 / 6))
    ]


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


def assert_facts(found: LabelStatistics, expected: dict[str, Any], close: float = 1e-9) -> None:
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
        torch.testing.assert_close(
            found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-14
        )


def saturated(kind: Kind, batch: Any, scale: float, dtype: torch.dtype) -> Any:
    """The batch with logits that are so sure of the labels of the data."""
    logits, labels = parts(kind, batch)
    if kind.axis is None:
        return ((labels * 2 - 1 + 1e-3 * logits) * scale).to(dtype), labels.to(dtype)
    targets = labels.clamp(min=0)
    targets = targets.roll(-1, 1) if kind.model is Named else targets
    sure = 1e-3 * logits + F.one_hot(targets, C)
    sure = (sure * scale).to(dtype)
    return {"logits": sure, "labels": labels} if kind.model is Named else (sure, labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["classes, none", "tokens, mean", "bits", "next tokens"])
@pytest.mark.parametrize("scale", [10.0, 40.0, 100.0, 1e4])
def test_saturated_logits_have_finite_weights(name: str, dtype: torch.dtype, scale: float) -> None:
    """Where every other label's probability rounds to nothing, nothing stands for others."""
    kind, given, labels = setting(name)
    labels.drawn(torch.arange(N), given)  # which shows what the loss is
    batch = saturated(kind, given, scale, dtype)
    drawn, facts = labels.drawn(torch.arange(N), batch)
    assert bool(torch.isfinite(facts.weights).all())
    assert bool((facts.weights >= 0).all())
    assert math.isfinite(float(facts.squares))
    if scale == 1e4:
        assert not facts.weights.any()
    if scale == 40.0:
        assert torch.equal(parts(kind, drawn)[1], parts(kind, batch)[1])
        assert facts.weights.max() > 1e10
        # the oracle's slopes round as those of the loss, but for float32 numbers near 1
        if kind.axis is not None or dtype == torch.float64:
            expected = facts_of(kind, batch, drawn)
            torch.testing.assert_close(facts.weights, expected["weights"], rtol=1e-4, atol=0)


def test_a_loss_that_is_no_likelihood_has_no_facts() -> None:
    batch = of_classes(N)
    focal = Loss(lambda o, t: F.cross_entropy(o, t, reduction="none").square(), "none", "loss_fn")
    assert ModelLabels(Outputs(), focal, 0).given(torch.arange(N), batch) is None


# Sums of batches.


def of_rows(rows: Tensor) -> Gradients:
    form = Dense(rows, rows.shape[1:])
    return Gradients(len(rows), {"weight": form}, {"weight": rows.shape[1:]}, rows)


def made_up(n: int, residuals: bool) -> tuple[Gradients, LabelStatistics]:
    own = torch.rand(n, 2).double()
    facts = LabelStatistics(
        labels=torch.tensor(3 * n),
        squares=own.sum() * 5,
        residuals=own.square().sum() if residuals else None,
        weights=torch.rand(n).double(),
    )
    return of_rows(own), facts


@pytest.mark.parametrize("of_data", [False, True])
@pytest.mark.parametrize("residuals", [False, True])
def test_a_tally_sums_over_batches_that_count_once(of_data: bool, residuals: bool) -> None:
    torch.manual_seed(0)
    tally, batches = Tally(of_data), {}
    for place, n in ((0, 4), (4, 4), (8, 3), (4, 4), (0, 4)):
        # what came last is what counts
        batches[place] = made_up(n, residuals)
        tally.add(place, batches[place][1], batches[place][0])
    every = list(batches.values())
    squares = torch.cat([g.flat().square().sum(1) for g, _ in every])
    weights = torch.cat([facts.weights for _, facts in every])
    labels = sum(int(facts.labels) for _, facts in every)
    if residuals:
        count = labels / float(sum(facts.residuals for _, facts in every))
        expected = [count**2 if of_data else count, labels / 11]
    else:
        expected = [labels / float(sum(facts.squares for _, facts in every)), math.inf]
    expected.append(float(squares @ weights / squares.sum()))
    found = tally.result(torch.zeros(()))
    assert found.dtype == torch.float64
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0
    )


def test_one_batch_without_facts_has_every_example_as_an_observation() -> None:
    tally = Tally(of_data=True)
    gradients, facts = made_up(4, residuals=True)
    tally.add(0, facts, gradients)
    tally.add(4, None, gradients)
    assert tally.result(torch.zeros(())).tolist() == [1.0, math.inf, 1.0]


def test_no_gradient_and_no_residual() -> None:
    _, facts = made_up(4, residuals=True)
    tally = Tally(of_data=False)
    nothing = LabelStatistics(facts.labels, facts.squares, torch.zeros(()).double(), facts.weights)
    tally.add(0, nothing, of_rows(torch.zeros(4, 2).double()))
    assert tally.result(torch.zeros(())).tolist() == [math.inf, 3.0, 1.0]


@every_kind
@pytest.mark.parametrize("of_data", [False, True])
def test_a_tally_does_not_see_the_batch_size(name: str, of_data: bool) -> None:
    """N per example: labels over the sum of squared factors; of errors over their variance."""
    kind, batch, _ = setting(name)
    gradients = torch.randn(N, 2).double()
    results = []
    for size in (1, 3, N):
        labels, tally = ModelLabels(kind.model(), kind.known, 3), Tally(of_data)
        for rows in torch.arange(N).split(size):
            part = {k: v[rows] for k, v in batch.items()} if isinstance(batch, dict) else None
            part = tuple(v[rows] for v in batch) if part is None else part
            facts = labels.given(rows, part) if of_data else labels.drawn(rows, part)[1]
            tally.add(int(rows[0]), facts, of_rows(gradients[rows]))
        results.append(tally.result(torch.zeros(())))
    for found in results:
        torch.testing.assert_close(found, results[0], rtol=1e-12, atol=0)
    given = batch if of_data else ModelLabels(kind.model(), kind.known, 3)(torch.arange(N), batch)
    facts = facts_of(kind, batch, given)
    assert int(facts["labels"]) > 0
    scale = facts["squares"] if kind.precision is None else facts["residuals"]
    count = facts["labels"] / scale
    count = count**2 if of_data and kind.precision is not None else count
    values = math.inf if kind.precision is None else facts["labels"] / N
    norms = gradients.square().sum(1)
    excess = 1.0 if of_data else float(norms @ facts["weights"] / norms.sum())
    expected = torch.tensor([count, values, excess], dtype=torch.float64)
    torch.testing.assert_close(results[0], expected, rtol=1e-9, atol=0)
