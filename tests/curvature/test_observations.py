"""The number of observations that labels show, and slopes against all labels that there are."""

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

from influence_kit.curvature import sampled_slopes
from influence_kit.curvature.observations import LabelStatistics, Tally, curvature_factor
from influence_kit.curvature.sampled_slopes import SampledSlopes
from influence_kit.data.batches import SLOPES
from influence_kit.data.class_labels import with_logits
from influence_kit.losses.loss import Loss
from influence_kit.losses.model_losses import READINGS, OwnLoss, next_token_losses

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
        OwnLoss(next_token_losses, READINGS[0]),
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


def facts_of(kind: Kind, batch: Any) -> dict[str, Any]:
    logits, labels = parts(kind, batch)
    factors = torch.stack([kind.factor(own).double() for own in labels])
    residuals = None
    if kind.precision is not None:
        residuals = kind.precision * float((logits - labels).square().sum())
    return {
        "labels": int((factors > 0).sum()),
        "squares": float(factors.square().sum()),
        "residuals": residuals,
    }


def assert_facts(found: LabelStatistics, expected: dict[str, Any], close: float = 1e-9) -> None:
    assert int(found.labels) == expected["labels"]
    assert float(found.squares) == pytest.approx(expected["squares"], rel=close)
    if expected["residuals"] is None:
        assert found.residuals is None
    else:
        assert float(found.residuals) == pytest.approx(expected["residuals"], rel=close)


def setting(name: str) -> tuple[Kind, Any, SampledSlopes]:
    kind = KINDS[name]
    torch.manual_seed(1)
    batch = kind.batch(N)
    return kind, batch, SampledSlopes(kind.model(), kind.known, 3)


def slopes_in(batch: Any) -> Tensor:
    return batch[SLOPES] if isinstance(batch, dict) else batch[-1]


# Facts of labels.


@every_kind
def test_facts_of_labels(name: str) -> None:
    """Of the labels of the data, whatever is sampled."""
    kind, batch, sampled = setting(name)
    expected = facts_of(kind, batch)
    assert expected["labels"] > 0
    assert_facts(sampled.sampled(torch.arange(N), batch)[1], expected)
    given = sampled.given(torch.arange(N), batch)
    assert given is not None
    assert_facts(given, expected)


def mean_squares(
    sampled: SampledSlopes, batch: Any, monkeypatch: pytest.MonkeyPatch
) -> tuple[Tensor, Tensor]:
    """The mean squared slope of each example over all vectors of signs, and its deviation."""
    found = []
    for pattern in itertools.product((-1.0, 1.0), repeat=C):

        def chosen(_: int, indices: Tensor, positions: int, __: int, own: Any = pattern) -> Tensor:
            return torch.tensor(own).repeat(len(indices), positions, 1)

        monkeypatch.setattr(sampled_slopes, "signs", chosen)
        slopes = slopes_in(sampled(torch.arange(N), batch))
        found.append(slopes.reshape(N, -1).double().square().sum(1))
    return torch.stack(found).mean(0), torch.stack(found).std(0)


@every_kind
def test_the_mean_squared_slope_is_that_over_all_labels(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, batch, sampled = setting(name)
    logits, labels = parts(kind, batch)
    found, deviation = mean_squares(sampled, batch, monkeypatch)
    expected = [expected_square(kind, z, own) for z, own in zip(logits, labels, strict=True)]
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-14
    )
    if kind.axis is None:
        assert deviation.max() < 1e-9, "signs do not change a square"


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
@pytest.mark.parametrize("scale", [10.0, 40.0, 80.0, 1e4])
def test_saturated_logits(
    name: str, dtype: torch.dtype, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where every other label's probability rounds to nothing, there are slopes all the same."""
    kind, given, sampled = setting(name)
    sampled.sampled(torch.arange(N), given)  # which shows what the loss is
    batch = saturated(kind, given, scale, dtype)
    exact = saturated(kind, given, scale, torch.float64)
    assert_facts(sampled.sampled(torch.arange(N), batch)[1], facts_of(kind, exact), 1e-6)
    found, _ = mean_squares(sampled, batch, monkeypatch)
    assert bool(torch.isfinite(found).all())
    if scale == 1e4:
        assert not found.any()
        return
    logits, labels = parts(kind, batch)
    pairs = zip(logits.double(), labels, strict=True)
    expected = torch.tensor([stable_square(kind, z, own) for z, own in pairs]).double()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    assert found.max() > 0


def stable_square(kind: Kind, logits: Tensor, labels: Tensor) -> float:
    """The sum over positions of the squared factor times sum_c p_c (1 - p_c), without 1 - p."""
    factors = kind.factor(labels.double() if kind.axis is None else labels).reshape(-1)
    if kind.axis is None:
        return float((factors.square() * logits.sigmoid() * (-logits).sigmoid()).sum())
    shift, total = int(kind.model is Named), 0.0
    for position, factor in enumerate(factors.tolist()):
        if factor:
            p = logits.reshape(-1, C)[position - shift].softmax(0).tolist()
            pairs = itertools.permutations(range(C), 2)
            total += factor**2 * sum(p[i] * p[j] for i, j in pairs)
    return total


def test_a_loss_that_is_no_likelihood_has_no_facts() -> None:
    batch = of_classes(N)
    focal = Loss(lambda o, t: F.cross_entropy(o, t, reduction="none").square(), "none", "loss_fn")
    assert SampledSlopes(Outputs(), focal, 0).given(torch.arange(N), batch) is None


# Sums of batches.


def made_up(n: int, residuals: bool) -> LabelStatistics:
    own = torch.rand(n, 2).double()
    return LabelStatistics(
        labels=torch.tensor(3 * n),
        squares=own.sum() * 5,
        residuals=own.square().sum() if residuals else None,
    )


@pytest.mark.parametrize("of_data", [False, True])
@pytest.mark.parametrize("residuals", [False, True])
def test_a_tally_sums_over_batches_that_count_once(of_data: bool, residuals: bool) -> None:
    torch.manual_seed(0)
    tally, batches = Tally(of_data), {}
    for place, n in ((0, 4), (4, 4), (8, 3), (4, 4), (0, 4)):
        # what came last is what counts
        batches[place] = made_up(n, residuals)
        tally.add(place, n, batches[place])
    every = list(batches.values())
    labels = sum(int(facts.labels) for facts in every)
    if residuals:
        count = labels / float(sum(facts.residuals for facts in every))
        expected = [count**2 if of_data else count, labels / 11]
    else:
        expected = [labels / float(sum(facts.squares for facts in every)), math.inf]
    found = tally.result(torch.zeros(()))
    assert found.dtype == torch.float64
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0
    )


def test_one_batch_without_facts_has_every_example_as_an_observation() -> None:
    tally = Tally(of_data=True)
    tally.add(0, 4, made_up(4, residuals=True))
    tally.add(4, 4, None)
    assert tally.result(torch.zeros(())).tolist() == [1.0, math.inf]


def test_no_residual() -> None:
    facts = made_up(4, residuals=True)
    tally = Tally(of_data=False)
    tally.add(0, 4, LabelStatistics(facts.labels, facts.squares, torch.zeros(()).double()))
    assert tally.result(torch.zeros(())).tolist() == [math.inf, 3.0]


@pytest.mark.parametrize(
    ("totals", "of_data", "factor"),
    [
        ([16.0, math.inf], False, 4.0),
        ([16.0, math.inf], True, 4.0),
        ([16.0, 3.0], True, 4.0),
        ([16.0, 3.0], False, 1.0),
    ],
)
def test_the_units_of_a_curvature(totals: list[float], of_data: bool, factor: float) -> None:
    """T for a mean over T tokens, whose N is T^2 n; 1 for slopes of a known variance."""
    assert curvature_factor(torch.tensor(totals), of_data) == factor


@every_kind
@pytest.mark.parametrize("of_data", [False, True])
def test_a_tally_does_not_see_the_batch_size(name: str, of_data: bool) -> None:
    """N per example: labels over the sum of squared factors; of errors over their variance."""
    kind, batch, _ = setting(name)
    results = []
    for size in (1, 3, N):
        sampled, tally = SampledSlopes(kind.model(), kind.known, 3), Tally(of_data)
        for rows in torch.arange(N).split(size):
            part = {k: v[rows] for k, v in batch.items()} if isinstance(batch, dict) else None
            part = tuple(v[rows] for v in batch) if part is None else part
            facts = sampled.given(rows, part) if of_data else sampled.sampled(rows, part)[1]
            tally.add(int(rows[0]), len(rows), facts)
        results.append(tally.result(torch.zeros(())))
    for found in results:
        torch.testing.assert_close(found, results[0], rtol=1e-12, atol=0)
    facts = facts_of(kind, batch)
    assert int(facts["labels"]) > 0
    scale = facts["squares"] if kind.precision is None else facts["residuals"]
    count = facts["labels"] / scale
    count = count**2 if of_data and kind.precision is not None else count
    values = math.inf if kind.precision is None else facts["labels"] / N
    expected = torch.tensor([count, values], dtype=torch.float64)
    torch.testing.assert_close(results[0], expected, rtol=1e-9, atol=0)
