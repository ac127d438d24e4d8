"""Tail patch against plain training steps of copies of the model."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from influence_kit import GradDot, KMostInfluentialResults
from influence_kit.errors import InvalidArgumentError, NonFiniteError
from influence_kit.evaluation import tail_patch

N, M, K = 14, 4, 3
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(N, 5, generator=GENERATOR, dtype=torch.float64)
Y = torch.arange(N) % 3
QUERY = (torch.randn(M, 5, generator=GENERATOR, dtype=torch.float64), torch.tensor([0, 1, 2, 1]))
DATA = TensorDataset(X, Y)
SCORES = torch.randn(M, N, generator=GENERATOR, dtype=torch.float64)
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def network():
    torch.manual_seed(0)
    layers = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3)
    return nn.Sequential(*layers).double()


MODEL = network()


def stepped(rows, make):
    model = copy.deepcopy(MODEL).eval()
    F.cross_entropy(model(X[rows]), Y[rows]).backward()
    make(model.parameters()).step()
    return model


@torch.no_grad()
def loss_of(model, t):
    return float(F.cross_entropy(model(QUERY[0][t : t + 1]), QUERY[1][t : t + 1]))


def expected(make, together):
    gains = []
    for t in range(M):
        top = SCORES[t].argsort(descending=True)[:K].tolist()
        groups = [top] if together else [[i] for i in top]
        after = [loss_of(stepped(rows, make), t) for rows in groups]
        gains.append(loss_of(copy.deepcopy(MODEL).eval(), t) - sum(after) / len(after))
    return gains


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("make", [SGD, partial(torch.optim.AdamW, lr=0.01)])
def test_gains_are_those_of_a_plain_step(make, together):
    loss_fn = nn.CrossEntropyLoss()
    indices = SCORES.argsort(dim=1, descending=True)[:, :K]
    best = KMostInfluentialResults(indices, SCORES.gather(1, indices))
    for scores in (SCORES, best):
        for inputs in (QUERY, TensorDataset(*QUERY), DataLoader(TensorDataset(*QUERY), 3)):
            found = tail_patch(MODEL, DATA, scores, inputs, loss_fn, make, K, together)
            assert found.per_test.tolist() == pytest.approx(expected(make, together), abs=1e-12)


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_the_reduction_of_the_loss_does_not_matter(reduction):
    loss_fn = nn.CrossEntropyLoss(reduction=reduction)
    found = tail_patch(MODEL, DATA, SCORES, QUERY, loss_fn, SGD, K)
    assert found.per_test.tolist() == pytest.approx(expected(SGD, True), abs=1e-12)


def test_small_steps_give_the_inner_products():
    loss_fn = nn.CrossEntropyLoss()
    dots = GradDot(MODEL, DATA, [MODEL.state_dict()], loss_fn=loss_fn).influence(QUERY)
    lr = 1e-6
    small = partial(torch.optim.SGD, lr=lr)
    found = tail_patch(MODEL, DATA, dots, QUERY, loss_fn, small, k=1)
    torch.testing.assert_close(found.per_test / lr, dots.max(dim=1).values, rtol=1e-4, atol=1e-6)


def test_the_model_is_what_it_was():
    model = network().train()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = copy.deepcopy(model.state_dict())
    tail_patch(model, DATA, SCORES, QUERY, nn.CrossEntropyLoss(), SGD, K)
    failing = partial(torch.optim.SGD, lr=1e200)
    with pytest.raises(NonFiniteError, match=r"the loss of test example 0 is .* before and "):
        tail_patch(model, DATA, SCORES, QUERY, nn.CrossEntropyLoss(), failing, K)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert model[3].weight.grad is None


def patch(**changed):
    given = {"train_dataset": DATA, "scores": SCORES, "inputs": QUERY, "optimizer": SGD, "k": K}
    return tail_patch(**{"model": MODEL, "loss_fn": nn.CrossEntropyLoss(), **given, **changed})


CASES = [
    (
        {"train_dataset": DataLoader(DATA)},
        "`train_dataset` must be a Dataset or sequence of examples, .*: pass the data set of a",
    ),
    (
        {"train_dataset": TensorDataset(X[:9], Y[:9])},
        "`train_dataset` has 9 examples and the scores are of 14; pass the data set that was",
    ),
    ({"scores": SCORES[:2]}, "`inputs` holds more test examples, and there are scores of 2"),
    ({"scores": SCORES.repeat(2, 1)}, "`inputs` holds 4 test examples, and there are scores of 8"),
    ({"optimizer": lambda parameters: 3}, "`optimizer` returned 3; it is called as optimizer"),
    ({"optimizer": 0.1}, "`optimizer` must be a function, called as optimizer"),
    ({"loss_fn": 3}, "`loss_fn` must be a function"),
    ({"together": 1}, "`together` must be True or False; got 1"),
    ({"k": N + 1}, "`k` is 15; there are 14 training examples"),
    ({"model": network().requires_grad_(False)}, "`model` has no parameter that requires a grad"),
]


@pytest.mark.parametrize(("changed", "message"), CASES)
def test_wrong_arguments_are_refused(changed, message):
    with pytest.raises(InvalidArgumentError, match=message):
        patch(**changed)
