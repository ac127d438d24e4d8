"""Seeds, flags, texts, functions, sequences and dicts: what is taken, and what is refused."""

import numpy as np
import pytest
import torch

from influence_kit.core.arguments import (
    check_count,
    check_flag,
    check_function,
    check_mapping,
    check_number,
    check_seed,
    check_seeds,
    check_sequence,
    check_text,
    check_texts,
    shown,
)
from influence_kit.errors import InvalidArgumentError


class Rude:
    def __repr__(self) -> str:
        raise RuntimeError("no")


def test_good_values_come_back():
    assert check_seed(np.int64(3)) == check_seed(torch.tensor(3)) == 3
    assert check_seeds(np.arange(2)) == [0, 1]
    assert check_flag(np.bool_(True), "keep") is True
    assert check_text("a", "title") == "a"
    assert check_function(len, "fit", "fit(x)") is len
    rows = torch.zeros(2, 3)
    assert check_sequence(rows, "images", "images", 2) is rows
    assert check_texts(("a", "b"), "titles", "one per row") == ["a", "b"]
    assert check_mapping({"a": 1}, "scores", "{name: scores}") == {"a": 1}


def test_values_are_shown_short_and_with_their_type():
    assert shown("a") == "'a'"
    assert shown(None) == "None"
    assert shown(np.float32(2)) in ("np.float32(2.0) (float32)", "np.float32(2.0)")
    assert "Rude" in shown(Rude())
    assert len(shown(list(range(1000)))) < 100


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: check_seed(1.5), "a seed must be an int; got 1.5"),
        (lambda: check_seed(2**64), "a seed must be an int of at most 64 bits; got 18446744073"),
        (lambda: check_seeds([]), "`seeds` is empty; at least one seed is needed"),
        (lambda: check_flag("no", "keep"), "`keep` must be True or False; got 'no'"),
        (lambda: check_flag(1, "keep"), "`keep` must be True or False; got 1"),
        (lambda: check_text(3, "label", "None"), "`label` must be a str or None; got 3"),
        (
            lambda: check_function(3, "fit", "fit(indices) -> model"),
            r"`fit` must be a function, called as fit\(indices\) -> model; got 3",
        ),
        (
            lambda: check_sequence("abc", "titles", "texts"),
            "`titles` must be a list, a tensor or another sequence of texts; got 'abc'",
        ),
        (
            lambda: check_sequence((i for i in "ab"), "titles", "texts"),
            "another sequence of texts; got <generator",
        ),
        (
            lambda: check_sequence(torch.tensor(3.0), "labels", "labels"),
            r"of labels; got a single value, tensor\(3",
        ),
        (
            lambda: check_sequence(torch.zeros(2, device="meta"), "labels", "labels"),
            r"`labels` must be a dense tensor.* got a meta tensor of shape \[2\]",
        ),
        (
            lambda: check_sequence(torch.eye(2).to_sparse(), "labels", "labels"),
            r"got a sparse tensor of shape \[2, 2\]",
        ),
        (
            lambda: check_sequence([1], "labels", "one per row", 2),
            "`labels` has 1 items; there must be 2, one per row",
        ),
        (lambda: check_texts(["a", 2], "titles", "x"), r"`titles\[1\]` must be a str; got 2"),
        (lambda: check_mapping([1], "scores", "{name: s}"), r"must be a dict \{name: s\}; got \[1"),
        (
            lambda: check_mapping({}, "scores", "{name: s}"),
            r"`scores` is empty; pass a dict \{name",
        ),
        (lambda: check_mapping({1: 2}, "scores", "x"), "the keys of `scores` must be str; got 1"),
        (lambda: check_count(9, "n", most=8), "a positive int and at most 8; got 9"),
        (
            lambda: check_number(10**30, "x"),
            "a finite number, written as a float where it has more",
        ),
    ],
)
def test_other_values_are_refused(call, message):
    with pytest.raises(InvalidArgumentError, match=message):
        call()
