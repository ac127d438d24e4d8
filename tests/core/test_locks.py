"""Threads: with one model they take turns, with copies each works alone; all answers are right."""

import copy
import random
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from influence_kit import (
    ArnoldiInfluenceFunction,
    CGInfluenceFunction,
    EKFACInfluenceFunction,
    ExplicitInfluenceFunction,
    GradDot,
    KNNShapley,
    LiSSAInfluenceFunction,
    NystromInfluenceFunction,
)
from influence_kit.core.locks import alone_with
from influence_kit.core.random_states import same_random_states
from influence_kit.operators import functions

torch.manual_seed(0)
TRAIN = torch.randn(9, 3, dtype=torch.float64), torch.arange(9) % 2
TEST = torch.randn(4, 3, dtype=torch.float64), torch.arange(4) % 2
METHODS = {
    "GradDot": (GradDot, {}),
    "EKFAC": (EKFACInfluenceFunction, {"damping": 0.1}),
    "Explicit": (ExplicitInfluenceFunction, {"damping": 0.1}),
    "CG": (CGInfluenceFunction, {"damping": 0.1}),
    "LiSSA": (LiSSAInfluenceFunction, {"damping": 1.0}),
    "Nystroem": (NystromInfluenceFunction, {"damping": 0.1, "rank": 5}),
    "Arnoldi": (ArnoldiInfluenceFunction, {"projection_dim": 4, "hessian_reg": 1.0}),
}


def loss(outputs, targets):
    return F.cross_entropy(outputs, targets, reduction="none")


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Dropout(), nn.Linear(5, 2)).double()


def checkpoints(seed):
    torch.manual_seed(seed)
    return [{k: v + 0.3 * torch.randn_like(v) for k, v in net().state_dict().items()}]


def scores(model, name, states):
    kind, keywords = METHODS[name]
    if kind is ArnoldiInfluenceFunction:
        states = states[0]
    return kind(model, TensorDataset(*TRAIN), states, loss_fn=loss, **keywords).influence(TEST)


@pytest.mark.parametrize("copies", [False, True])
def test_threads_get_the_scores_of_a_thread_alone(unchanged, copies):
    model = net()
    given = [(name, checkpoints(seed)) for seed in range(3) for name in METHODS]
    expected = [scores(net(), *one) for one in given]
    models = [copy.deepcopy(model) if copies else model for _ in given]
    filters = list(warnings.filters)
    with unchanged(model), ThreadPoolExecutor(6) as threads:
        found = list(threads.map(lambda m, one: scores(m, *one), models, given))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert list(warnings.filters) == filters


def test_objects_are_made_while_others_have_the_model(unchanged):
    model, states = net(), checkpoints(0)
    data = TensorDataset(*TRAIN)

    def asked(layers):
        method = GradDot(model, data, states, layers=layers, loss_fn=loss, batch_size=1)
        return method.influence(TEST)

    chosen = [None, ["0"], ["3"]]
    expected = [asked(layers) for layers in chosen]
    with unchanged(model), ThreadPoolExecutor(6) as threads:
        found = list(threads.map(asked, chosen * 12))
    for number, scores in enumerate(found):
        torch.testing.assert_close(scores, expected[number % 3])


def test_perturbations_in_threads():
    def perturbed(model, states):
        method = CGInfluenceFunction(
            model, TensorDataset(*TRAIN), states, loss_fn=loss, damping=0.1
        )
        return method.perturbation_influence(TEST)

    states = [checkpoints(seed) for seed in range(6)]
    expected = [perturbed(net(), one) for one in states]
    with ThreadPoolExecutor(6) as threads:
        found = list(threads.map(perturbed, [net() for _ in states], states))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_models_that_share_a_module_take_turns(unchanged):
    body = net()[:3]
    heads = [nn.Sequential(body, nn.Linear(5, 2).double()) for _ in range(2)]

    states = [[{k: v + 0.1 for k, v in head.state_dict().items()}] for head in heads]

    def with_states(number):
        head, state = heads[number % 2], states[number % 2]
        return GradDot(head, TensorDataset(*TRAIN), state, loss_fn=loss).influence(TEST)

    expected = [with_states(0), with_states(1)] * 6
    with unchanged(heads[0]), unchanged(heads[1]), ThreadPoolExecutor(4) as threads:
        found = list(threads.map(with_states, range(12)))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_functions_in_threads():
    points = [torch.linspace(0.1, 1 + seed, 4, dtype=torch.float64) for seed in range(8)]

    def matrices(point):
        return [
            functions.hessian(lambda x: (x.sin() * x.roll(1)).sum(), point).dense(),
            functions.fisher(lambda x: x.outer(x).sin().sum(0), point).dense(),
        ]

    expected = [matrices(point) for point in points]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(matrices, points))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_thread_waits_for_the_one_that_has_the_model():
    model, order = net(), []
    inside = threading.Event()

    def second():
        inside.wait()
        with alone_with(model[0]), alone_with(model):
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    with alone_with(model), alone_with(model):
        inside.set()
        thread.join(0.05)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


class Drawing(TensorDataset):
    """Draws from every generator that there is."""

    def __getitem__(self, index):
        torch.rand(1)
        np.random.rand()  # noqa: NPY002
        random.random()
        return super().__getitem__(index)


def drawn():
    of_numpy = float(np.random.rand())  # noqa: NPY002
    return float(torch.rand(1)), of_numpy, random.random()


def seed():
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    random.seed(5)


@pytest.mark.parametrize("kind", [GradDot, KNNShapley])
def test_numbers_of_torch_numpy_and_python_are_those_drawn_without_a_call(kind):
    model, data, states = net(), Drawing(*TRAIN), checkpoints(0)
    keywords = {"layer": "1"} if kind is KNNShapley else {"loss_fn": loss}
    seed()
    expected = drawn()
    seed()
    kind(model, data, states, **keywords).influence(TEST)
    assert drawn() == expected


def test_random_states_come_back_where_blocks_of_threads_overlap():
    seed()
    expected = drawn()
    seed()
    first, second = same_random_states(), same_random_states()
    inside = threading.Event(), threading.Event()

    def other():
        with second:
            drawn()
            inside[0].set()
            inside[1].wait()
            drawn()

    thread = threading.Thread(target=other)
    with first:
        drawn()
        thread.start()
        inside[0].wait()
        with same_random_states():
            drawn()
    inside[1].set()
    thread.join()
    assert drawn() == expected
