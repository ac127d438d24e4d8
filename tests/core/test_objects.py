"""Models, functions, flags, paths and words: what is none is refused where it comes in."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from influence_kit import GradDot, TracInCPFastRandProj, load_checkpoint
from influence_kit.core.objects import (
    check_dtype,
    check_flags,
    check_flags_of_call,
    check_functions,
    check_model,
    check_path,
    is_one_of,
)
from influence_kit.errors import InvalidArgumentError

X, Y = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.arange(4) % 2


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (None, "`model` must be a torch.nn.Module; got None"),
        (nn.Linear, "got the class Linear: make an object of it"),
        (torch.zeros(2), "`model` must be a torch.nn.Module; got tensor"),
    ],
)
def test_what_is_no_model_is_refused(value, match):
    with pytest.raises(InvalidArgumentError, match=match):
        check_model(value)
    with pytest.raises(InvalidArgumentError, match=match):
        load_checkpoint(value, {})
    with pytest.raises(InvalidArgumentError, match=match):
        GradDot(value, TensorDataset(X, Y), [{}], loss_fn=nn.CrossEntropyLoss())


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"loss_fn": nn.CrossEntropyLoss}, r"pass an object of it, CrossEntropyLoss\(\)"),
        ({"test_loss_fn": 1.5}, "`test_loss_fn` must be a function, called as fn"),
        ({"checkpoints_load_func": None}, "`checkpoints_load_func` must be a function"),
        ({"checkpoints_load_func": "path"}, "`checkpoints_load_func` must be a function"),
        ({"eval_mode": 1}, "`eval_mode` must be True or False; got 1"),
        ({"store": 3}, "`store` must be a path, a str or pathlib.Path, or None; got 3"),
        ({"store_dtype": "half"}, "`store_dtype` must be a torch.dtype, .*got 'half'"),
        ({"sample_wise_grads_per_batch": 2}, "must be True or False; got 2"),
        ({"verify": np.array(["once"])}, '`verify` must be "repeated" or "once"'),
        ({"batch_size": 2**63}, "and at most 9223372036854775807"),
        ({"checkpoints": {"a", "b"}}, "expected a folder, a glob or an iterable"),
        ({"checkpoints": np.array(3.0)}, "a single value, array"),
    ],
)
def test_arguments_of_a_method(given, match):
    model = nn.Linear(3, 2)
    arguments = {"checkpoints": [model.state_dict()], "loss_fn": nn.CrossEntropyLoss()}
    with pytest.raises(InvalidArgumentError, match=match):
        GradDot(model, TensorDataset(X, Y), **{**arguments, **given})


@pytest.mark.parametrize("name", ["proponents", "show_progress", "aggregate"])
def test_flags_of_a_question(name):
    model = nn.Linear(3, 2)
    dot = GradDot(model, TensorDataset(X, Y), [model.state_dict()], loss_fn=nn.CrossEntropyLoss())
    with pytest.raises(InvalidArgumentError, match=f"`{name}` must be True or False; got 'no'"):
        dot.influence((X, Y), **{name: "no"})
    assert dot.influence((X, Y), **{name: np.True_}) is not None


def test_flags_of_a_call_by_position_and_name():
    def method(self, inputs, flag: bool = False, *, other: "bool" = True): ...

    check_flags_of_call(method, (7, True), {"other": False})
    with pytest.raises(InvalidArgumentError, match="`flag` must be True or False; got 1"):
        check_flags_of_call(method, (7, 1), {})
    with pytest.raises(InvalidArgumentError, match="`other` must be True or False; got None"):
        check_flags_of_call(method, (), {"other": None})


def test_values_that_are_taken():
    assert check_path("a", "folder") == check_path(Path("a"), "folder") == Path("a")
    assert check_dtype(torch.float16, "store_dtype") is torch.float16
    check_functions({"loss_fn": None, "other": len}, "fn(outputs, targets)")
    check_flags({"a": True, "b": np.False_})
    assert is_one_of("a", ("a", None))
    assert is_one_of(None, ("a", None))
    assert not is_one_of(np.array(["a", "a"]), ("a", None))


@pytest.mark.parametrize("value", [b"bytes", 3, None, "with\0zero"])
def test_what_is_no_path(value):
    with pytest.raises(InvalidArgumentError, match=re.escape("`folder` must be a path, a str or")):
        check_path(value, "folder")


def test_an_index_that_is_none():
    model = nn.Linear(3, 2)
    with (
        pytest.warns(UserWarning, match="stores quantities"),
        pytest.raises(InvalidArgumentError, match=r"must be a NearestNeighbors, such as .*got 3"),
    ):
        TracInCPFastRandProj(
            model,
            model,
            TensorDataset(X, Y),
            [model.state_dict()],
            loss_fn=nn.CrossEntropyLoss(),
            nearest_neighbors=3,
        )
