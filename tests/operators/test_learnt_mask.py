"""The learnt mask against its fit written out by hand, and on gradients whose answer is known."""

import math
from collections.abc import Callable

import pytest
import torch
from matrices import normal
from torch import Tensor

from influence_kit.operators.learnt_mask import RATE, STEPS, learnt_mask


def objective(gradients: Tensor, logits: Tensor, sparsity: float) -> Tensor:
    """The mean over queries of the correlation, less the mask's mean: one query at a time."""
    n = len(gradients)
    mask = 1 / (1 + torch.exp(-logits))
    total = torch.zeros((), dtype=gradients.dtype)
    for query in range(n):
        others = [place for place in range(n) if place != query]
        before = torch.stack([gradients[query] @ gradients[i] for i in others])
        after = torch.stack([(gradients[query] * mask**2) @ gradients[i] for i in others])
        total = total + torch.corrcoef(torch.stack([before, after]))[0, 1]
    return total / n - sparsity * mask.mean()


def fitted(gradients: Tensor, sparsity: float) -> Tensor:
    """The logits after Adam's steps (arXiv 1412.6980), each written out."""
    logits = torch.zeros(gradients.shape[1], dtype=gradients.dtype)
    first, second = torch.zeros_like(logits), torch.zeros_like(logits)
    for step in range(1, STEPS + 1):
        leaf = logits.clone().requires_grad_()
        (slope,) = torch.autograd.grad(-objective(gradients, leaf, sparsity), leaf)
        first = 0.9 * first + 0.1 * slope
        second = 0.999 * second + 0.001 * slope**2
        root = (second / (1 - 0.999**step)).sqrt() + 1e-8
        logits = logits - RATE * first / (1 - 0.9**step) / root
    return logits


def scaled(gradients: Tensor) -> Tensor:
    """Of mean square 1, as the fit takes them."""
    return gradients / gradients.square().mean().sqrt()


def planted(n: int, p: int, told: Tensor, noise: float = 0.05) -> Tensor:
    """Gradients that are large at some entries and nearly nothing elsewhere."""
    gradients = noise * normal(n, p)
    gradients[:, told] = normal(n, len(told), seed=1)
    return gradients


@pytest.mark.parametrize("sparsity", [1e-3, 0.5])
@pytest.mark.parametrize(("n", "p"), [(3, 8), (7, 12), (10, 5)])
def test_it_is_the_fit_written_out(n: int, p: int, sparsity: float) -> None:
    gradients = normal(n, p, seed=n) * torch.linspace(0.2, 3, p, dtype=torch.float64)
    logits = fitted(scaled(gradients), sparsity)
    ordered = logits.sort(descending=True)
    for k in range(1, p + 1):
        clear = k == p or ordered.values[k - 1] - ordered.values[k] > 1e-6
        assert clear, "a tie would tell nothing"
        found = learnt_mask(gradients, k, sparsity)
        assert torch.equal(found, ordered.indices[:k].sort().values)


def test_it_finds_the_entries_that_tell() -> None:
    told = torch.tensor([3, 11, 17, 18, 39])
    gradients = planted(20, 40, told)
    assert torch.equal(learnt_mask(gradients, 5), told)


def test_it_keeps_inner_products_better_than_a_random_mask() -> None:
    gradients = normal(30, 60) * torch.linspace(0, 2, 60, dtype=torch.float64) ** 2

    def kept(chosen: Tensor) -> float:
        some = gradients[:, chosen]
        pairs = torch.triu_indices(30, 30, 1)
        both = [(g @ g.T)[pairs[0], pairs[1]] for g in (gradients, some)]
        return float(torch.corrcoef(torch.stack(both))[0, 1])

    random = [
        torch.randperm(60, generator=torch.Generator().manual_seed(s))[:12] for s in range(20)
    ]
    assert kept(learnt_mask(gradients, 12)) > max(kept(chosen) for chosen in random)


@pytest.mark.parametrize("factor", [1e-30, 1e-6, 1e6, 1e30])
def test_the_scale_of_gradients_does_not_matter(factor: float) -> None:
    gradients = planted(12, 30, torch.tensor([1, 5, 20]), noise=0.5)
    for k in (3, 10):
        assert torch.equal(learnt_mask(gradients * factor, k), learnt_mask(gradients, k))


def test_single_precision_finds_the_same() -> None:
    gradients = planted(12, 30, torch.tensor([1, 5, 20]))
    assert torch.equal(learnt_mask(gradients.float(), 3), learnt_mask(gradients, 3))


@pytest.mark.parametrize("k", [1, 4, 9])
def test_places_ascend_and_none_comes_twice(k: int) -> None:
    chosen = learnt_mask(normal(6, 9), k)
    assert chosen.shape == (k,)
    assert chosen.dtype == torch.int64
    assert bool((chosen.diff() > 0).all())
    assert 0 <= int(chosen[0]) <= int(chosen[-1]) < 9


@pytest.mark.parametrize(
    "gradients",
    [
        torch.zeros(5, 6, dtype=torch.float64),
        torch.ones(5, 6, dtype=torch.float64),
        torch.eye(5, 6, dtype=torch.float64),
        normal(1, 6).expand(5, 6),
    ],
    ids=["zeros", "ones", "of one entry", "all the same"],
)
def test_gradients_that_tell_nothing(gradients: Tensor) -> None:
    """Any entries will do, but there are as many as asked for."""
    assert len(learnt_mask(gradients, 4).unique()) == 4


def test_an_example_without_a_gradient() -> None:
    told = torch.tensor([2, 7])
    gradients = planted(12, 20, told)
    gradients[4] = 0
    assert torch.equal(learnt_mask(gradients, 2), told)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_it_may_be_asked_anywhere(mode: Callable[[], torch.no_grad]) -> None:
    """Nothing of the caller's is changed: gradients, random state, whether gradients are on."""
    gradients = planted(12, 20, torch.tensor([2, 7])).requires_grad_()
    before, state = gradients.detach().clone(), torch.get_rng_state()
    with mode():
        enabled = torch.is_grad_enabled()
        chosen = learnt_mask(gradients, 2)
        assert torch.is_grad_enabled() == enabled
    assert torch.equal(chosen, torch.tensor([2, 7]))
    assert not chosen.requires_grad
    assert gradients.grad is None
    assert torch.equal(gradients.detach(), before)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_objective_of_the_oracle() -> None:
    """At logits of +-30 the mask is 1 or 0: the correlation of a hard mask, less its share."""
    gradients = normal(6, 10)
    chosen = torch.tensor([0, 4, 9])
    logits = torch.full((10,), -30.0, dtype=torch.float64)
    logits[chosen] = 30.0
    hard = gradients[:, chosen]
    rows = []
    for query in range(6):
        others = [i for i in range(6) if i != query]
        before, after = (g[others] @ g[query] for g in (gradients, hard))
        rows.append(torch.corrcoef(torch.stack([before, after]))[0, 1])
    expected = torch.stack(rows).mean() - 0.2 * 0.3
    assert math.isclose(objective(gradients, logits, 0.2), expected, rel_tol=1e-9)
