"""Batches of any kind are counted, cut, moved and given to a model one way."""

from collections import UserDict, namedtuple
from types import MappingProxyType

import pytest
import torch
from torch import nn

from influence_kit.data.batches import (
    call_model,
    example_axis,
    example_count,
    is_batch,
    map_tensors,
    nbytes,
    split,
    take,
    targets_of,
    to_device,
)
from influence_kit.errors import InvalidArgumentError

N = 5
X = torch.arange(N * 3, dtype=torch.float64).reshape(N, 3)
Y = torch.arange(N)
ROWS = [slice(1, 4), slice(3, 9), torch.tensor([4, 0, 4])]
Pair = namedtuple("Pair", "features targets")


class Encoding(UserDict):
    """As transformers' ``BatchEncoding``: a mapping whose items are attributes, too."""

    def __getattr__(self, name):
        if name == "data" or name not in self.data:
            raise AttributeError(name)
        return self.data[name]


def same(a, b) -> bool:
    """Whether two nestings have the same types, keys and values."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict | UserDict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def words(rows=slice(None)) -> list[str]:
    return [f"word {i}" for i in range(N)][rows]


def index(rows) -> list[int]:
    return list(range(N)[rows]) if isinstance(rows, slice) else rows.tolist()


# a batch, and what some rows of it are
BATCHES = {
    "tuple": ((X, Y), lambda i: (X[i], Y[i])),
    "list": ([X, Y], lambda i: [X[i], Y[i]]),
    "named tuple": (Pair(X, Y), lambda i: Pair(X[i], Y[i])),
    "several inputs": ((X, X + 1, Y), lambda i: (X[i], X[i] + 1, Y[i])),
    "dict": ({"x": X, "labels": Y}, lambda i: {"x": X[i], "labels": Y[i]}),
    "encoding": (Encoding(x=X, labels=Y), lambda i: Encoding(x=X[i], labels=Y[i])),
    "nested": (
        ((X, {"mask": X > 2}), [Y, None], Y),
        lambda i: ((X[i], {"mask": X[i] > 2}), [Y[i], None], Y[i]),
    ),
    "dict of targets": ((X, {"a": Y, "b": X}), lambda i: (X[i], {"a": Y[i], "b": X[i]})),
    "strings": ((X, words(), Y), lambda i: (X[i], [words()[j] for j in i], Y[i])),
    "time first": (
        (torch.stack([X, X + 1]), Y),
        lambda i: (torch.stack([X[i], X[i] + 1]), Y[i]),
    ),
    "shared": (
        (X, torch.ones(7, 2), torch.tensor(3.0), "text", 4, ["a", "b"], Y),
        lambda i: (X[i], torch.ones(7, 2), torch.tensor(3.0), "text", 4, ["a", "b"], Y[i]),
    ),
}


@pytest.mark.parametrize("name", BATCHES)
def test_the_examples_of_any_batch_are_counted(name):
    assert example_count(BATCHES[name][0]) == N


@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("name", BATCHES)
def test_some_rows_of_a_batch_are_those_rows_of_what_has_rows(name, rows):
    batch, expected = BATCHES[name]
    assert same(take(batch, rows), expected(index(rows)))


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", BATCHES)
def test_the_pieces_of_a_batch_are_its_rows_in_order(name, size):
    batch, expected = BATCHES[name]
    starts = range(0, N, size)
    pieces = list(split(batch, size))
    assert len(pieces) == len(starts)
    for start, piece in zip(starts, pieces, strict=True):
        assert same(piece, expected(index(slice(start, start + size))))


@pytest.mark.parametrize("size", [N, N + 1])
def test_a_batch_that_fits_is_one_piece_and_the_same_object(size):
    batch = (X, Y)
    (piece,) = split(batch, size)
    assert piece is batch


@pytest.mark.parametrize("name", BATCHES)
def test_a_moved_batch_has_the_same_types_and_items(name):
    batch = BATCHES[name][0]
    assert same(to_device(batch, torch.device("cpu")), batch)


def test_a_moved_batch_leaves_the_users_own_untouched():
    batch = Encoding(x=X, labels=Y)
    moved = to_device(batch, torch.device("meta"))
    assert batch.x is X
    assert (moved.x.device.type, moved.labels.device.type) == ("meta", "meta")


def test_a_mapping_that_cannot_be_changed_becomes_a_dict():
    batch = MappingProxyType({"x": X, "labels": Y})
    assert same(take(batch, slice(0, 2)), {"x": X[:2], "labels": Y[:2]})


def test_every_tensor_of_a_nesting_is_changed_and_nothing_else():
    changed = map_tensors((X, [Y, "a"], {"b": (Y, 1)}, ("c",)), lambda tensor: tensor + 1)
    assert same(changed, (X + 1, [Y + 1, "a"], {"b": (Y + 1, 1)}, ("c",)))


def test_bytes_of_a_batch_are_those_of_its_tensors():
    assert nbytes((X, {"y": Y}, ["text"])) == N * 3 * 8 + N * 8


@pytest.mark.parametrize(
    ("batch", "shown"),
    [
        ((3, "x"), r"got a tuple of a int, a str"),
        ({"a": [1.0]}, r"got a dict of a: a list of a float"),
        ((torch.tensor(1.0),), r"got a tuple of a tensor of shape \[\]"),
        ((X[:0], Y[:0]), r"got a tuple of a tensor of shape \[0, 3\], a tensor of shape \[0\]"),
        ([], r"got a list of"),
    ],
    ids=str,
)
def test_a_batch_without_examples_is_refused_with_what_it_holds(batch, shown):
    with pytest.raises(
        InvalidArgumentError, match=f"must hold a tensor with one row per example; {shown}"
    ):
        example_count(batch)


@pytest.mark.parametrize(
    ("batch", "remedy"),
    [
        ((X.numpy(), Y.numpy()), r"Convert its arrays and lists to tensors \(`torch.as_tensor`\)"),
        ((X[:0], Y[:0]), "It is empty"),
        ((torch.tensor(1.0),), "as `batch_axes`"),
    ],
    ids=["arrays", "empty", "numbers"],
)
def test_what_to_do_about_a_batch_without_examples_is_told(batch, remedy):
    with pytest.raises(InvalidArgumentError, match=remedy):
        example_count(batch)


@pytest.mark.parametrize(
    ("shape", "axis"), [((5, 2), 0), ((2, 5), 1), ((5, 5), 0), ((2, 3, 5), None), ((), None)]
)
def test_the_axis_of_the_examples_is_the_first_or_second_of_that_length(shape, axis):
    assert example_axis(torch.zeros(shape), 5) == axis


def test_targets_are_the_last_item_or_the_whole_dict():
    batch = {"x": X, "labels": Y}
    assert targets_of((X, X, Y)) is Y
    assert targets_of(batch) is batch


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [((X,), True), ([X], True), ({"x": X}, True), (Encoding(x=X), True), (X, False), (None, False)],
)
def test_tuples_lists_and_mappings_are_batches(inputs, expected):
    assert is_batch(inputs) is expected


class Scaled(nn.Module):
    def forward(self, x, scale=1.0):
        return x * scale


class Everything(nn.Module):
    def forward(self, **items):
        return sorted(items)


def test_a_model_takes_all_of_a_tuple_but_the_targets():
    assert torch.equal(call_model(Scaled(), (X, torch.tensor(2.0), Y)), 2 * X)
    assert torch.equal(call_model(Scaled(), [X, Y]), X)


@pytest.mark.parametrize("kind", [dict, Encoding, MappingProxyType])
def test_a_model_takes_the_keys_of_a_dict_that_its_forward_names(kind):
    batch = kind({"labels": Y, "scale": 3.0, "idx": Y, "x": X})
    assert torch.equal(call_model(Scaled(), batch), 3 * X)


def test_a_forward_of_any_keywords_takes_all_keys():
    assert call_model(Everything(), {"labels": Y, "x": X}) == ["labels", "x"]
