"""Margins against log p - log(1 - p) of a softmax, their slopes, and what has none."""

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from matrices import normal
from torch import Tensor
from torch.nn import functional as F

from influence_kit import classification_margin
from influence_kit.errors import InvalidArgumentError
from influence_kit.losses.loss import Loss
from influence_kit.losses.margins import one_minus_probability, slope_along

N, T, C = 6, 4, 5


def labels(*shape: int) -> Tensor:
    return torch.randint(0, C, shape, generator=torch.Generator().manual_seed(3))


def by_hand(logits: Tensor, label: int) -> Tensor:
    """Of one row of logits: log p - log of the sum of the others' p."""
    p = logits.exp() / logits.exp().sum()
    others = torch.cat([p[:label], p[label + 1 :]])
    return p[label].log() - others.sum().log()


# Values.


def test_margins_of_classes() -> None:
    logits, y = 3 * normal(N, C), labels(N)
    expected = torch.stack([by_hand(row, int(label)) for row, label in zip(logits, y, strict=True)])
    found = classification_margin(logits, y)
    assert found.shape == (N,)
    assert torch.allclose(found, expected, rtol=1e-12)
    p = logits.softmax(1)[torch.arange(N), y]
    assert torch.allclose(found, p.log() - (1 - p).log(), rtol=1e-10)
    assert torch.allclose(one_minus_probability(logits, y), 1 - p, rtol=1e-12)


@pytest.mark.parametrize("layout", ["n t c", "n c t"])
@pytest.mark.parametrize("ignored", [-100, -1])
def test_margins_of_sequences(layout: str, ignored: int) -> None:
    """The sum over positions, and the mean of 1 - p, where labels count."""
    logits, y = 2 * normal(N, T, C), labels(N, T)
    y[0, 1], y[2, :3], y[4] = ignored, ignored, ignored
    margins, wrong = [], []
    for rows, own in zip(logits, y.tolist(), strict=True):
        counted = [(row, label) for row, label in zip(rows, own, strict=True) if label >= 0]
        zero = torch.zeros((), dtype=torch.float64)
        margins.append(sum((by_hand(row, label) for row, label in counted), zero))
        shares = [1 - row.softmax(0)[label] for row, label in counted]
        wrong.append(sum(shares, zero) / max(1, len(shares)))
    shown = logits if layout == "n t c" else logits.movedim(2, 1).contiguous()
    assert torch.allclose(classification_margin(shown, y), torch.stack(margins), rtol=1e-12)
    assert torch.allclose(one_minus_probability(shown, y), torch.stack(wrong), rtol=1e-12)


def test_margins_of_maps() -> None:
    """Segmentation: one label a pixel, classes in the second dimension."""
    logits, y = normal(N, C, 2, 3), labels(N, 2, 3)
    flat = classification_margin(logits.flatten(2), y.flatten(1))
    assert torch.equal(classification_margin(logits, y), flat)
    assert torch.equal(
        one_minus_probability(logits, y), one_minus_probability(logits.flatten(2), y.flatten(1))
    )


def test_as_many_positions_as_classes_are_positions_first() -> None:
    logits, y = normal(N, C, C), labels(N, C)
    apart = [classification_margin(logits[:, t], y[:, t]) for t in range(C)]
    assert torch.allclose(classification_margin(logits, y), torch.stack(apart).sum(0), rtol=1e-12)


@pytest.mark.parametrize("ignored", [-100, -1])
def test_examples_without_a_label_count_nothing(ignored: int) -> None:
    logits, y = normal(N, C).requires_grad_(), labels(N)
    y[[1, 3]] = ignored
    found = classification_margin(logits, y)
    whole = classification_margin(logits, y.clamp(min=0))
    assert torch.equal(found == 0, y < 0)
    assert torch.equal(found[y >= 0], whole[y >= 0])
    assert not torch.autograd.grad(found.sum(), logits)[0][y < 0].any()
    assert torch.equal(one_minus_probability(logits, y) == 0, y < 0)


def test_two_classes_are_a_difference_of_logits() -> None:
    logits, y = normal(N, 2), torch.arange(N) % 2
    expected = (logits[:, 1] - logits[:, 0]) * (2 * y - 1)
    assert torch.equal(classification_margin(logits, y), expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
def test_labels_of_any_integers(dtype: torch.dtype) -> None:
    logits, y = normal(N, C), labels(N)
    assert torch.equal(classification_margin(logits, y.to(dtype)), classification_margin(logits, y))


# Where a probability rounds to 1 or 0.


@pytest.mark.parametrize("gap", [20.0, 200.0, 1e4, 1e30])
@pytest.mark.parametrize("ahead", [True, False])
def test_margins_are_finite_where_probabilities_round(gap: float, ahead: bool) -> None:
    logits = torch.tensor([[gap if ahead else -gap, 0.0, 1.0]]).requires_grad_()
    y = torch.tensor([0])
    p = logits.softmax(1)[0, 0]
    assert p == 1 or not ahead
    margin = classification_margin(logits, y)
    assert torch.isfinite(margin).all()
    expected = (gap if ahead else -gap) - math.log(1 + math.e)
    assert math.isclose(margin.item(), expected, rel_tol=1e-6)
    (slope,) = torch.autograd.grad(margin.sum(), logits)
    share = 1 / (1 + math.exp(-1))
    assert torch.allclose(slope, torch.tensor([[1.0, share - 1, -share]]), rtol=1e-6)
    wrong = one_minus_probability(logits, y).item()
    assert math.isclose(
        wrong, 1 / (1 + math.exp(min(expected, 700.0))), rel_tol=1e-5, abs_tol=1e-45
    )
    assert (wrong > 0) == (expected < 80), "kept where 1 - p would be 0"


def test_slopes_of_the_margin() -> None:
    """1 at the label's logit, minus the softmax over the other classes at theirs."""
    logits, y = (5 * normal(N, C)).requires_grad_(), labels(N)
    (found,) = torch.autograd.grad(classification_margin(logits, y).sum(), logits)
    masked = logits.detach().clone()
    masked[torch.arange(N), y] = -torch.inf
    expected = -masked.softmax(1)
    expected[torch.arange(N), y] = 1
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-15)
    assert torch.allclose(found.sum(1), torch.zeros(N).double(), atol=1e-12)


# Where logits and labels are.


@dataclass
class Output:
    logits: Tensor
    loss: Tensor | None = None


KEYS = ["labels", "label", "targets", "target", "y"]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("kind", [Output, lambda logits: {"logits": logits}, lambda logits: logits])
def test_outputs_and_batches_of_any_kind(kind: Any, key: str) -> None:
    logits, y = normal(N, C), labels(N)
    batch = {"x": normal(N, 2), key: y}
    expected = classification_margin(logits, y)
    assert torch.equal(classification_margin(kind(logits), batch), expected)
    assert torch.equal(classification_margin(kind(logits), y), expected)
    wrong = one_minus_probability(logits, y)
    assert torch.equal(one_minus_probability(kind(logits), batch), wrong)


# Mistakes.

FIT = r"the margin of a classifier does not fit \({}\); pass `output_fn\(outputs, targets\)`"


@pytest.mark.parametrize(
    ("outputs", "targets", "why"),
    [
        (normal(N, C), normal(N), "the targets are torch.float64, not class labels"),
        (normal(N, C), labels(N) > 2, "the targets are torch.bool, not class labels"),
        (
            normal(N),
            labels(N),
            r"outputs of shape \[6\] are not logits of two or more classes for labels .* \[6\]",
        ),
        (
            normal(N, 1),
            labels(N),
            r"outputs of shape \[6, 1\] are not logits of two or more classes .* \[6\]",
        ),
        (normal(N, C), labels(N, 1), r"outputs of shape \[6, 5\] .* labels of shape \[6, 1\]"),
        (normal(N, C), labels(N - 1), r"outputs of shape \[6, 5\] .* labels of shape \[5\]"),
        (normal(N, T, C), labels(N), r"outputs of shape \[6, 4, 5\] .* labels of shape \[6\]"),
        (normal(N, T, C), labels(N, 3), r"outputs of shape .* labels of shape \[6, 3\]"),
        ([normal(N, C)], labels(N), "the model returns a list without `logits`"),
        ({"scores": normal(N, C)}, labels(N), "the model returns a dict without `logits`"),
        (
            normal(N, C),
            {"x": normal(N, 2)},
            r"none of the keys \['x'\] is a known key of labels",
        ),
        (normal(N, C), {"labels": [0] * N}, "the labels are a list, not a tensor"),
    ],
)
def test_what_has_no_margin(outputs: Any, targets: Any, why: str) -> None:
    for function in (classification_margin, one_minus_probability):
        with pytest.raises(InvalidArgumentError, match=FIT.format(why + ".*")):
            function(outputs, targets)


@pytest.mark.parametrize(("shape", "shift"), [((), 1), ((T,), -1), ((T,), True), ((2, 3), 1)])
def test_a_shift_without_positions(shape: tuple[int, ...], shift: Any) -> None:
    match = r"`shift` must be None, or a number of positions for labels \[n, t\]; got"
    with pytest.raises(InvalidArgumentError, match=match):
        classification_margin(normal(N, *shape, C), labels(N, *shape), shift)


# The slope of a loss along another function.


def slope(
    loss: Any, output: Any, outputs: Any, batch: Any, reduction: str | None = "none"
) -> Tensor:
    return slope_along(Loss(loss, reduction, "loss_fn"), output, outputs, batch, N)


def squared(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.flatten() - targets) ** 2


def prediction(outputs: Tensor, targets: Any) -> Tensor:
    return outputs.flatten()


@pytest.mark.parametrize("shape", [(N,), (N, 1)])
def test_the_slope_of_a_squared_error_along_the_prediction(shape: tuple[int, ...]) -> None:
    f, y = normal(*shape), normal(N, seed=1)
    found = slope(squared, prediction, f, (None, y))
    assert found.shape == (N,)
    assert torch.allclose(found, 2 * (y - f.flatten()), rtol=1e-12)


def test_the_slope_of_a_function_of_the_output() -> None:
    """L = h(f) has slope -h'(f), whatever f is of the logits."""
    z = normal(N, 3)

    def output(outputs: Tensor, targets: Any) -> Tensor:
        return outputs.sin().sum(1) + outputs.prod(1)

    found = slope(lambda o, t: output(o, t).pow(3) / t, output, z, (None, torch.arange(1.0, N + 1)))
    expected = -3 * output(z, None) ** 2 / torch.arange(1.0, N + 1)
    assert torch.allclose(found, expected, rtol=1e-12)


def test_the_slope_of_cross_entropy_along_the_margin_is_one_minus_p() -> None:
    logits, y = 4 * normal(N, C), labels(N)
    found = slope(
        lambda o, t: F.cross_entropy(o, t, reduction="none"), classification_margin, logits, (0, y)
    )
    assert torch.allclose(found, one_minus_probability(logits, y), rtol=1e-12)


def test_the_slope_of_another_loss_is_that_of_least_squares() -> None:
    """Which makes what is left of the loss's gradient orthogonal to that of the output."""
    z = normal(N, 3).requires_grad_()

    def loss(outputs: Tensor, targets: Any) -> Tensor:
        return outputs.exp().sum(1)

    def output(outputs: Tensor, targets: Any) -> Tensor:
        return (outputs**2).sum(1)

    found = slope(loss, output, z, (None, None))
    (down,) = torch.autograd.grad(loss(z, None).sum(), z)
    (along,) = torch.autograd.grad(output(z, None).sum(), z)
    left = down + found[:, None] * along
    assert torch.allclose((left * along).sum(1), torch.zeros(N).double(), atol=1e-12)
    assert not found.requires_grad


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_the_slope_of_a_reduced_loss(reduction: str) -> None:
    f, y = normal(N), normal(N, seed=1)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(outputs, targets, reduction=reduction)

    assert torch.allclose(slope(loss, prediction, f, (None, y), reduction), 2 * (y - f))


def test_the_slope_in_outputs_and_batches_of_any_kind() -> None:
    f, y = normal(N), normal(N, seed=1)
    batch = {"x": normal(N, 2), "labels": y}
    shown = {"logits": f, "hidden": normal(N, 7)}
    found = slope(
        lambda o, b: (o["logits"] - b["labels"]) ** 2, lambda o, b: o["logits"], shown, batch
    )
    assert torch.allclose(found, 2 * (y - f), rtol=1e-12)
    with torch.no_grad():
        assert torch.equal(slope(squared, prediction, f, (None, y)), found)


def test_the_slope_of_an_object_with_logits() -> None:
    z, y = normal(N, C), labels(N)
    found = slope_along(
        Loss(lambda o, t: F.cross_entropy(o.logits, t, reduction="none"), "none", "loss_fn"),
        classification_margin,
        SimpleNamespace(logits=z, loss=None),
        (None, y),
        N,
    )
    assert torch.allclose(found, one_minus_probability(z, y))


@pytest.mark.parametrize("name", ["output_fn", "loss_fn"])
def test_what_does_not_look_at_the_logits_has_no_slope(name: str) -> None:
    functions: Any = {"output_fn": lambda o, t: o.sum(1), "loss_fn": lambda o, t: o.sum(1)}
    functions[name] = lambda o, t: torch.zeros(N)
    with pytest.raises(
        InvalidArgumentError, match=f"`{name}` is not a function of the model's out"
    ):
        slope(functions["loss_fn"], functions["output_fn"], normal(N, 2), (None, None))


def test_an_output_that_does_not_move_has_slope_zero() -> None:
    z = normal(N, 2)
    z[2] = 0
    found = slope(lambda o, t: o.sum(1), lambda o, t: (o**2).sum(1), z, (None, None))
    assert found[2] == 0
    assert bool(torch.isfinite(found).all())
