"""The learnt mask against its fit written out by hand, and on gradients whose answer is known."""

import itertools
from collections.abc import Callable

import pytest
import torch
from matrices import normal
from torch import Tensor

from influence_kit.projections.learnt_mask import RATE, STEPS, learnt_mask


def correlation(gradients: Tensor, chosen: Tensor) -> float:
    """The mean over queries of the correlation before and after masking: one query at a time."""
    masked = gradients[:, chosen]
    found = []
    for query in range(len(gradients)):
        others = [place for place in range(len(gradients)) if place != query]
        before = torch.stack([gradients[query] @ gradients[i] for i in others])
        after = torch.stack([masked[query] @ masked[i] for i in others])
        found.append(torch.corrcoef(torch.stack([before, after]))[0, 1])
    return torch.stack(found).mean().item()


def relaxed(gradients: Tensor, mask: Tensor) -> Tensor:
    """The same for a mask of any numbers, which weigh the entries' products."""
    found = []
    for query in range(len(gradients)):
        others = [place for place in range(len(gradients)) if place != query]
        before = gradients[others] @ gradients[query]
        after = gradients[others] @ (mask * gradients[query])
        found.append(torch.corrcoef(torch.stack([before, after]))[0, 1])
    return torch.stack(found).mean()


def by_hand(gradients: Tensor, k: int) -> tuple[Tensor, bool]:
    """The best of the masks on the way of Adam (arXiv 1412.6980), each step written out.

    And whether no two entries, or masks, were so close that rounding might choose between them.
    """
    n, p = gradients.shape
    scores = torch.zeros(p, dtype=gradients.dtype)
    for query in range(n):
        others = [place for place in range(n) if place != query]
        inner = gradients[others] @ gradients[query]
        inner = (inner - inner.mean()) / (inner - inner.mean()).norm()
        scores += (gradients[others] * inner[:, None]).sum(0) * gradients[query]
    scores = scores / scores.std(correction=0)
    first, second = torch.zeros_like(scores), torch.zeros_like(scores)
    reached, masks, clear = [], [], True
    for step in range(1, STEPS + 1):
        ordered = scores.sort(descending=True)
        clear &= k == p or bool(ordered.values[k - 1] - ordered.values[k] > 1e-9)
        mask = torch.zeros_like(scores)
        mask[ordered.indices[:k]] = 1
        masks.append(ordered.indices[:k].sort().values)
        reached.append(correlation(gradients, masks[-1]))
        leaf = mask.requires_grad_()
        (slope,) = torch.autograd.grad(-relaxed(gradients, leaf), leaf)
        soft = 1 / (1 + torch.exp(-scores))
        slope = slope * soft * (1 - soft)
        first = 0.9 * first + 0.1 * slope
        second = 0.999 * second + 0.001 * slope**2
        root = (second / (1 - 0.999**step)).sqrt() + 1e-8
        scores = scores - RATE * first / (1 - 0.9**step) / root
    best = max(range(STEPS), key=reached.__getitem__)
    for place, mask in enumerate(masks):
        clear &= torch.equal(mask, masks[best]) or reached[best] - reached[place] > 1e-9
    return masks[best], clear


def planted(n: int, p: int, told: Tensor, noise: float = 0.05) -> Tensor:
    """Gradients that are large at some entries and nearly nothing elsewhere."""
    gradients = noise * normal(n, p)
    gradients[:, told] = normal(n, len(told), seed=1)
    return gradients


@pytest.mark.parametrize(("n", "p"), [(5, 8), (7, 12), (10, 20)])
@pytest.mark.parametrize("k", [2, 5])
def test_it_is_the_fit_written_out(n: int, p: int, k: int) -> None:
    gradients = normal(n, p, seed=n) * torch.linspace(0.2, 3, p, dtype=torch.float64)
    gradients /= gradients.abs().max()
    expected, clear = by_hand(gradients, k)
    assert clear, "a tie would tell nothing"
    assert torch.equal(learnt_mask(gradients, k), expected)


def test_it_finds_the_entries_that_tell() -> None:
    told = torch.tensor([3, 11, 17, 18, 39])
    gradients = planted(20, 40, told)
    assert torch.equal(learnt_mask(gradients, 5), told)


@pytest.mark.parametrize("k", [4, 12, 30])
@pytest.mark.parametrize("constant", [False, True])
def test_it_keeps_inner_products_better_than_other_masks(k: int, constant: bool) -> None:
    """Than 50 random ones; than that of the largest entries where they are large for every example.

    Where entries are independent the largest are best, and nothing can be gained.
    """
    gradients = normal(30, 60) * torch.linspace(0, 2, 60, dtype=torch.float64) ** 2
    if constant:
        gradients[:, 20:40] = 9 + 0.01 * gradients[:, 20:40]
    found = correlation(gradients, learnt_mask(gradients, k))
    generators = [torch.Generator().manual_seed(seed) for seed in range(50)]
    random = [torch.randperm(60, generator=generator)[:k] for generator in generators]
    assert found > max(correlation(gradients, other) for other in random)
    largest = correlation(gradients, gradients.square().sum(0).topk(k).indices)
    assert found > (largest + 0.4 * (1 - largest) if constant else largest - 0.01)


def test_it_is_near_the_best_of_all_masks() -> None:
    gradients = normal(12, 14)
    every = [torch.tensor(some) for some in itertools.combinations(range(14), 4)]
    reached = torch.tensor([correlation(gradients, some) for some in every])
    found = correlation(gradients, learnt_mask(gradients, 4))
    assert (reached > found).double().mean() < 0.01, "in the best hundredth of 1,001 masks"


def test_it_is_not_decided_by_rounding() -> None:
    gradients = normal(20, 50)
    noise = 1 + 1e-14 * normal(20, 50, seed=1)
    for k in (5, 20):
        expected = learnt_mask(gradients, k)
        for other in (gradients * noise, gradients.flip(0), -gradients, gradients.float()):
            assert torch.equal(learnt_mask(other, k), expected)


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
