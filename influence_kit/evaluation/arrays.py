"""What users hand in, as tensors on the CPU: checked once, named in the errors.

Letters: m test and n training examples, S subsets of the training set, R repeats (seeds).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence_kit.core.arguments import check_number
from influence_kit.errors import InvalidArgumentError

Values = Tensor | np.ndarray | Sequence[Any]


def numbers(values: Values, name: str, shape: str) -> Tensor:
    """The values in float64 on the CPU; they must be finite and have the dimensions of ``shape``.

    Args:
        values: a tensor, an array, or nested lists.
        name: the argument's name, for errors.
        shape: the dimensions, as in ``"[m, n]"``; only their number is checked.

    Raises:
        InvalidArgumentError: for another number of dimensions, no values, or one that is not
            finite.
    """
    tensor = _float64(values)
    if tensor.dim() != _dimensions(shape) or tensor.numel() == 0:
        raise InvalidArgumentError(f"`{name}` has shape {list(tensor.shape)}; expected {shape}")
    bad = torch.nonzero(~torch.isfinite(tensor))
    if len(bad):
        place = tuple(bad[0].tolist())
        raise InvalidArgumentError(
            f"{len(bad)} of the {tensor.numel()} values in `{name}` are not finite; the first is "
            f"{tensor[place].item()} at {list(place)}"
        )
    return tensor


def repeated_numbers(values: Values, name: str, shape: str) -> Tensor:
    """As ``numbers``; values without the dimension ``R`` of the shape are those of one repeat."""
    tensor = _float64(values)
    if tensor.dim() == _dimensions(shape) - 1:
        tensor = tensor.unsqueeze(shape.strip("[]").split(", ").index("R"))
    return numbers(tensor, name, shape)


def _float64(values: Values) -> Tensor:
    # at once: lists of numbers would become float32 on the way
    return torch.as_tensor(values, dtype=torch.float64, device="cpu").detach()


def _dimensions(shape: str) -> int:
    return shape.count(",") + 1


def marks(values: Values, name: str, shape: str, meaning: str) -> Tensor:
    """Booleans, or 0 and 1, as bool on the CPU.

    Args:
        values: a tensor, an array, or nested lists.
        name: the argument's name, for errors.
        shape: the dimensions, as in ``"[S, n]"``; only their number is checked.
        meaning: of True, for errors.

    Raises:
        InvalidArgumentError: for other values, another number of dimensions, or none.
    """
    tensor = torch.as_tensor(values).detach().cpu()
    if tensor.dim() != _dimensions(shape) or tensor.numel() == 0:
        raise InvalidArgumentError(
            f"`{name}` has shape {list(tensor.shape)}; expected {shape}: {meaning}"
        )
    other = tensor[(tensor != 0) & (tensor != 1)]
    if len(other):
        raise InvalidArgumentError(
            f"`{name}` holds {other[0].item()}; it must hold booleans, or 0 and 1: {meaning}"
        )
    return tensor.bool()


def class_labels(labels: Values, name: str, n: int) -> Tensor:
    """Labels of n examples as int64 on the CPU, ``[n]``."""
    tensor = torch.as_tensor(labels).detach().cpu()
    if tensor.shape != (n,) or tensor.is_floating_point() or tensor.is_complex():
        raise InvalidArgumentError(
            f"`{name}` has shape {list(tensor.shape)} and {tensor.dtype}; expected one class, an "
            f"integer, for each of the {n} examples"
        )
    return tensor.long()


def subset_masks(subsets: Values, n: int | None = None) -> Tensor:
    """Which examples each subset has, bool ``[S, n]`` on the CPU.

    Args:
        subsets: booleans, or 0 and 1, ``[S, n]``.
        n: how many examples there are, where that is known.

    Raises:
        InvalidArgumentError: for other values or shapes, or a subset that is empty.
    """
    meaning = "a row a subset, True where it has the training example (masks, not places)"
    shape = "[S, n]" if n is None else f"[S, {n}]"
    masks = marks(subsets, "subsets", shape, meaning)
    if n is not None and masks.shape[1] != n:
        raise InvalidArgumentError(
            f"`subsets` has shape {list(masks.shape)}; expected {shape}: {meaning}"
        )
    empty = torch.nonzero(~masks.any(dim=1)).flatten()
    if len(empty):
        raise InvalidArgumentError(f"subset {int(empty[0])} has no examples to train on")
    return masks


def places(indices: Values | None, n: int) -> Tensor:
    """Places in a training set of n examples, int64; all of them for None."""
    if indices is None:
        return torch.arange(n)
    tensor = torch.as_tensor(indices).detach().cpu()
    whole = not (tensor.is_floating_point() or tensor.dtype == torch.bool)
    if tensor.dim() != 1 or len(tensor) == 0 or not whole:
        raise InvalidArgumentError(
            f"`indices` has shape {list(tensor.shape)} and {tensor.dtype}; expected integers [k], "
            "one or more"
        )
    outside = tensor[(tensor < 0) | (tensor >= n)]
    if len(outside):
        raise InvalidArgumentError(
            f"`indices` holds {int(outside[0])}; the training set has {n} examples, 0 to {n - 1}"
        )
    return tensor.long()


def count_of(share: float, n: int) -> int:
    """A share of n examples as a whole number, halves up."""
    check_number(share, "fraction")
    return int(share * n + 0.5)


def standard_error(values: Tensor, dim: int = 0) -> Tensor | None:
    """The standard error of a mean of independent values along ``dim``; None for a single one."""
    count = values.shape[dim]
    return None if count < 2 else values.std(dim=dim) / count**0.5
