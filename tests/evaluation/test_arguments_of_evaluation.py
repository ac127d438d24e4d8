"""Arrays, methods, models and data that ``evaluation`` cannot take: what the errors say."""

import numpy as np
import pytest
import torch
from torch import nn

from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation import (
    BatchedSGD,
    Retraining,
    checkpoint_logits,
    compare,
    log_odds,
    tune_damping,
)
from influence_kit.evaluation.arrays import as_tensor, class_labels, numbers, pair_of_numbers

ROWS = [[1.0, 2.0], [3.0, 4.0]]


@pytest.mark.parametrize(
    "values",
    [
        ROWS,
        np.array(ROWS, dtype=">f4"),
        np.array(ROWS, dtype=np.longdouble),
        np.array(ROWS, dtype=np.uint16),
        np.array(ROWS)[::-1][::-1],
        torch.tensor(ROWS, dtype=torch.bfloat16, requires_grad=True),
        torch.tensor(ROWS).to(torch.uint32),
        [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])],
        (np.array([1, 2]), [3, 4]),
    ],
)
def test_arrays_of_all_kinds_are_taken(values):
    assert numbers(values, "scores", "[m, n]").tolist() == ROWS


def test_types_that_tell_something_are_kept():
    assert as_tensor(np.zeros((2, 2), dtype=np.uint8), "image", "pixels").dtype == torch.uint8
    assert as_tensor([True, False], "marks", "booleans").dtype == torch.bool
    assert class_labels(np.array([3, 1], dtype=np.uint64), "labels", 2).tolist() == [3, 1]
    large = as_tensor(np.array([2**64 - 1], dtype=np.uint64), "scores", "numbers")
    assert large.tolist() == [2.0**64]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (None, r"`scores` must be a list, a tensor .* of real numbers \[m, n\]; got None"),
        ("text", "another sequence of real numbers .*; got 'text'"),
        ({1: 2}, r"another sequence of .*; got \{1: 2\}"),
        ([[1.0], [1.0, 2.0]], r"got \[\[1.0\], \[1.0, 2.0\]\], which is not an array"),
        ([["a"]], r"`scores` must be real numbers \[m, n\]; got \[\['a'\]\], of <U1 in numpy"),
        ([[10**400]], "of object in numpy"),
        ([[True, False]], r"`scores` must be real .*; got booleans of shape \[1, 2\]"),
        (torch.ones(1, 2, dtype=torch.bool), "got booleans of shape"),
        ([[1j]], "of complex128 in numpy"),
        (torch.zeros(1, 2, dtype=torch.complex64), r"got complex numbers \(torch.complex64\)"),
        (torch.zeros(1, 2, device="meta"), r"got a meta tensor of shape \[1, 2\]$"),
        (torch.eye(2).to_sparse(), r"got a sparse tensor of shape \[2, 2\]; pass the dense"),
        (np.ma.masked_array(np.eye(2), mask=np.eye(2)), "got a masked array; pass its values"),
        ([torch.zeros(2), torch.zeros(3)], r"got tensors of shapes \[\[2\], \[3\]\]"),
        (3.0, r"`scores` has shape \[\]; expected \[m, n\]"),
        ([], r"`scores` has shape \[0\]; expected \[m, n\]"),
    ],
)
def test_what_is_no_array_of_numbers_is_refused(values, message):
    with pytest.raises(InvalidArgumentError, match=message):
        numbers(values, "scores", "[m, n]")


class Method:
    damping = 1.0

    def influence(self, inputs):
        return torch.tensor([[1.0, 2.0, 3.0]])


def sgd(**changed):
    given = {
        "make_model": lambda: nn.Linear(2, 1),
        "inputs": torch.zeros(4, 2),
        "targets": torch.zeros(4, 1),
        "loss_fn": nn.MSELoss(),
        "epochs": 1,
        "learning_rate": 0.1,
        "batch_size": 2,
    }
    return BatchedSGD(**{**given, **changed})


def tuned(method, values):
    return tune_damping(method, values, [[1, 1, 0]] * 2, [[1.0], [2.0]], None, "margin")


CASES = [
    (lambda: pair_of_numbers([1], "it", "(a, b)", "[n]"), r"it must be a pair \(a, b\); got \[1\]"),
    (lambda: log_odds([[1.0]], torch.tensor([0])), "`logits` must be a dense tensor of real num"),
    (
        lambda: log_odds(torch.zeros(2, 3), torch.zeros(2)),
        r"`logits` has shape \[2, 3\] and `labels` \[2\], of torch.float32; expected \[m, c\]",
    ),
    (lambda: Retraining(len, folder=3), "`folder` must be the path of a folder, or None; got 3"),
    (lambda: Retraining(len, folder=""), "`folder` must be the path of a folder, or None; got ''"),
    (
        lambda: Retraining(len, model="m"),
        "`model` must be a torch.nn.Module like those .*; got 'm'",
    ),
    (lambda: Retraining(3), "`train_fn` must be a function, called as train_fn"),
    (lambda: compare("abc", None), r"`methods` must be a dict \{name: method\}, or a list .*'abc'"),
    (lambda: compare({"a": 3}, None), r"the method a is 3; expected scores \[m, n\], or an object"),
    (
        lambda: compare({"a": Method()}, None, truth=[1, 2, 3]),
        r"`truth` must be a SubsetTruth\(subsets, outputs, outputs_are\); got \[1, 2, 3\]",
    ),
    (lambda: tuned("a method", [1.0]), r"`method` must have `influence\(inputs\)`, .*got 'a meth"),
    (
        lambda: tuned(Method(), [torch.zeros(2)]),
        r"an item of `values` has shape \[2\]; each must be one value to try",
    ),
    (lambda: sgd(inputs=[1, 2]), r"`inputs` must be a dense tensor \[n, ...\], one row .*\[1, 2\]"),
    (lambda: sgd(make_model=lambda: 3), "`make_model` returned 3; it must return a new torch.nn.M"),
    (
        lambda: sgd(inputs=torch.zeros(4, 3)),
        r"the model fails on the first of `inputs`, torch.float32 of shape \[2, 3\]: ",
    ),
    (
        lambda: sgd(loss_fn=lambda outputs, targets: None),
        "torch.func.vmap cannot train this model",
    ),
    (
        lambda: sgd().checkpoints(torch.arange(4), 0, epochs=[True]),
        r"`epochs` is \[True\]; it must be one or more of 1 to 1, ascending",
    ),
    (
        lambda: sgd().stacked([[0, 9]], [0]),
        r"`subsets\[0\]` holds 9; the training set has 4 examples, 0 to 3",
    ),
    (
        lambda: checkpoint_logits(nn.ReLU(), [(torch.zeros(2), 0)], [{}]),
        r"`model` must be a torch.nn.Module with parameters; got ReLU\(\)",
    ),
]


@pytest.mark.parametrize(("call", "message"), CASES)
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(InvalidArgumentError, match=message):
        call()


def test_one_number_in_a_tensor_is_a_value_to_try():
    subsets, outputs = [[1, 1, 0], [0, 1, 1]], [[3.0], [5.0]]
    found = tune_damping(Method(), torch.tensor([0.5, 2.0]), subsets, outputs, None, "margin")
    assert found.values == (0.5, 2.0)


def test_scores_of_numpy_are_compared():
    scores = {"a": np.array([[1.0, 2.0, 3.0]]), "b": torch.tensor([[3.0, 2.0, 1.0]])}
    assert compare(scores, None).agreement[0, 1] == -1
