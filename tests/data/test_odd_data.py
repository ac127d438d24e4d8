"""Data and arguments beside it that are none: refused, with what to pass instead."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from influence_kit import (
    DVEmb,
    GradDot,
    TrainingTrace,
    classification_margin,
    cosine_similarity,
    euclidean_distance,
)
from influence_kit.errors import InvalidArgumentError

X, Y = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.arange(4) % 2


def dot(data, model):
    return GradDot(model, data, [model.state_dict()], loss_fn=nn.CrossEntropyLoss())


class Numbers:
    """An iterable whose items are no batches."""

    def __iter__(self):
        return iter([1.0, 2.0])


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ({1.0, 2.0}, "`train_dataset` is a set, which has no order"),
        ([None], "is a list that begins with None; it must be a Dataset"),
        ([3, 4], "is a list that begins with 3, which is not an example"),
        (np.array([None, 1]), "is a ndarray of Python objects"),
        (Numbers(), r"a batch must be a tuple or list `\(\*model_inputs, targets\)`, .*got 1.0"),
    ],
)
def test_training_sets(data, match):
    with pytest.raises(InvalidArgumentError, match=match):
        dot(data, nn.Linear(3, 2)).influence((X, Y))


def test_inputs_without_an_order():
    with pytest.raises(InvalidArgumentError, match="got a set: which has no order; pass a list"):
        dot(TensorDataset(X, Y), nn.Linear(3, 2)).influence({1.0})


@pytest.mark.parametrize("epochs", [1.5, "1", [], [7], torch.ones(2), [0.0]])
def test_epochs_of_a_trace(epochs):
    model = nn.Linear(3, 2)
    step = {"state_dict": model.state_dict(), "indices": [0, 1], "lr": 0.1, "epoch": 0}
    data, loss = TensorDataset(X, Y), nn.CrossEntropyLoss()
    with pytest.raises(InvalidArgumentError, match="`epochs` must be epochs of the trace"):
        DVEmb(model, data, [model.state_dict()], trace=[step], loss_fn=loss, epochs=epochs)


def test_an_optimizer_that_is_none():
    with pytest.raises(InvalidArgumentError, match=r"`optimizer` must be a torch.optim.Optimizer"):
        TrainingTrace(nn.Linear(3, 2), 0.1)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (
            {"shift": -1},
            r"`shift` must be None, or a number of positions for labels",
        ),
        ({"targets": 3}, "the targets are a int, not a tensor of labels"),
        ({"outputs": torch.ones(4, 2, dtype=torch.bool)}, "the outputs are torch.bool"),
        ({"outputs": torch.ones(4, 2, device="meta")}, "a sparse or meta tensor"),
    ],
)
def test_arguments_of_the_margin(given, match):
    with pytest.raises(InvalidArgumentError, match=match):
        classification_margin(**{"outputs": X[:, :2], "targets": Y, **given})


@pytest.mark.parametrize("metric", [cosine_similarity, euclidean_distance])
@pytest.mark.parametrize(
    ("train", "match"),
    [
        (None, r"distances are of dense tensors \[n, \*\]; got None"),
        (X.to_sparse(), r"distances are of dense tensors \[n, \*\]; got tensor"),
        (X[:, :2], "test and train have 3 and 2 numbers per example"),
    ],
)
def test_distances(metric, train, match):
    with pytest.raises(InvalidArgumentError, match=match):
        metric(X, train)
