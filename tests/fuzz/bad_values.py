"""The bad values that every argument is tried with, by name."""

import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn


class Plain:
    """An object of a user's that is none of what is asked for."""


class Marked(str):
    """A text that a template would insert unescaped."""

    __slots__ = ()

    def __html__(self) -> str:
        return "<script>run()</script>"


def deep(levels: int = 2000) -> list[Any]:
    """A list in a list, as deep as Python code cannot follow."""
    found: list[Any] = []
    for _ in range(levels):
        found = [found]
    return found


BAD: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "True": lambda: True,
    "False": lambda: False,
    "0": lambda: 0,
    "-1": lambda: -1,
    "2": lambda: 2,
    "1.5": lambda: 1.5,
    "-0.5": lambda: -0.5,
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "10**30": lambda: 10**30,
    "1j": lambda: 1j,
    "text": lambda: "text",
    "empty text": lambda: "",
    "marked text": lambda: Marked("text"),
    "bytes": lambda: b"abc",
    "object": Plain,
    "class": lambda: Plain,
    "function": lambda: Plain.__init__,
    "module": lambda: types.ModuleType("given"),
    "nn.Module": lambda: nn.Linear(2, 2),
    "[]": lambda: [],
    "[None]": lambda: [None],
    "list of text": lambda: ["a", "b", "c"],
    "ragged": lambda: [[1.0], [1.0, 2.0]],
    "deep list": deep,
    "list of nan": lambda: [float("nan")] * 6,
    "list of 10**400": lambda: [10**400] * 6,
    "list of bools": lambda: [True, False] * 3,
    "negative list": lambda: [-1, -2, -3],
    "nested tensors": lambda: [torch.zeros(2), torch.zeros(3)],
    "{}": dict,
    "dict": lambda: {"a": 1},
    "dict of numbers": lambda: {0: 1.0, 1: 2.0},
    "set": lambda: {1.0, 2.0, 3.0},
    "generator": lambda: (i for i in range(6)),
    "iterator": lambda: iter([1.0, 2.0]),
    "empty tensor": lambda: torch.zeros(0),
    "empty matrix": lambda: torch.zeros(0, 6),
    "0-d tensor": lambda: torch.tensor(3.0),
    "4-d tensor": lambda: torch.zeros(2, 2, 2, 2),
    "long tensor": lambda: torch.zeros(11),
    "tensor of nan": lambda: torch.full((3, 6), torch.nan),
    "tensor with inf": lambda: torch.full((6,), torch.inf),
    "complex tensor": lambda: torch.zeros(3, 6, dtype=torch.complex64),
    "bool tensor": lambda: torch.ones(3, 6, dtype=torch.bool),
    "meta tensor": lambda: torch.zeros(3, 6, device="meta"),
    "sparse tensor": lambda: torch.zeros(3, 6).to_sparse(),
    "tensor of 2**62": lambda: torch.full((6,), 2**62),
    "0-d array": lambda: np.array(3.0),
    "array of objects": lambda: np.array([None, "a", 1, 2, 3, 4], dtype=object),
    "array of text": lambda: np.array(["a"] * 6),
    "array of dates": lambda: np.array(["2020-01-01"] * 6, dtype="datetime64[D]"),
    "masked array": lambda: np.ma.masked_array(np.ones((3, 6)), mask=np.eye(3, 6)),
}
NONE, FLAGS = {"None"}, {"True", "False"}
