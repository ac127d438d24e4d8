"""Where arrays that users pass are taken in: as tensors on the CPU, checked, named in the errors.

Shapes: m test examples, n training examples, S subsets of the training set, R repeats (seeds).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence_kit.core.arguments import check_number, check_sequence, shown
from influence_kit.errors import InvalidArgumentError

Values = Tensor | np.ndarray | Sequence[Any]
# kinds of numpy arrays: booleans, integers, floating point
NUMERIC = "biuf"


def numbers(values: Values, name: str, shape: str) -> Tensor:
    """The values in float64 on the CPU; finite, and with the number of dimensions of ``shape``.

    Args:
        values: a tensor, an array, or nested lists.
        name: the argument's name, for errors.
        shape: the dimensions, as in ``"[m, n]"``; only their number is checked.

    Raises:
        InvalidArgumentError: for anything but real numbers (booleans are refused), another number
            of dimensions, no values, or a value that is not finite.
    """
    tensor = _real(values, name, shape)
    if tensor.dim() != _dimensions(shape) or tensor.numel() == 0:
        raise InvalidArgumentError(f"`{name}` has shape {list(tensor.shape)}; expected {shape}")
    bad = torch.nonzero(~torch.isfinite(tensor))
    if len(bad):
        index = tuple(bad[0].tolist())
        raise InvalidArgumentError(
            f"{len(bad)} of the {tensor.numel()} values in `{name}` are not finite; the first is "
            f"{tensor[index].item()} at index {list(index)}"
        )
    return tensor


def pair_of_numbers(pair: Any, name: str, what: str, shape: str) -> tuple[Tensor, Tensor]:
    """Two arrays in a tuple or list, each as ``numbers`` has it.

    Args:
        pair: the two.
        name: what to call them together, for errors.
        what: their names: "(predicted, actual)".
        shape: the dimensions of each.

    Raises:
        InvalidArgumentError: for what is not a pair; otherwise as ``numbers``.
    """
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise InvalidArgumentError(f"{name} must be a pair {what}; got {shown(pair)}")
    names = what.strip("()").split(", ")
    first, second = (
        numbers(values, f"{part} of {name}", shape)
        for values, part in zip(pair, names, strict=True)
    )
    return first, second


def repeated_numbers(values: Values, name: str, shape: str) -> Tensor:
    """As ``numbers``; values without the dimension ``R`` of the shape are those of one repeat."""
    tensor = _real(values, name, shape)
    if tensor.dim() == _dimensions(shape) - 1:
        tensor = tensor.unsqueeze(shape.strip("[]").split(", ").index("R"))
    return numbers(tensor, name, shape)


def as_tensor(values: Values, name: str, expected: str) -> Tensor:
    """The values as a dense tensor on the CPU, of the type that they have; lists in float64.

    Args:
        values: a tensor, an array, or nested lists.
        name: the argument's name, for errors.
        expected: what it must be, for errors: "numbers [m, n]".

    Raises:
        InvalidArgumentError: for what is not an array of numbers or booleans.
    """
    if isinstance(values, Tensor):
        return _dense(values, name, expected)
    if isinstance(values, list | tuple) and any(isinstance(item, Tensor) for item in values):
        rows = [as_tensor(item, name, expected) for item in values]
        if len({row.shape for row in rows}) > 1:
            raise _refusal(name, expected, f"tensors of shapes {[list(r.shape) for r in rows]}")
        return torch.stack(rows)
    if not isinstance(values, np.ndarray | np.generic | int | float) and not hasattr(
        values, "__array__"
    ):
        check_sequence(values, name, expected)
    return _from_numpy(values, name, expected)


def _dense(tensor: Tensor, name: str, expected: str) -> Tensor:
    if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
        kind = "meta" if tensor.is_meta else "quantized" if tensor.is_quantized else "sparse"
        instead = "" if tensor.is_meta else "; pass the dense tensor"
        raise _refusal(name, expected, f"a {kind} tensor of shape {list(tensor.shape)}{instead}")
    if tensor.is_complex():
        raise _refusal(name, expected, f"complex numbers ({tensor.dtype})")
    tensor = tensor.detach().cpu()
    if tensor.dtype in (torch.uint16, torch.uint32, torch.uint64):  # few operations have these
        return _from_numpy(tensor.numpy(), name, expected)
    return tensor


def _from_numpy(values: Any, name: str, expected: str) -> Tensor:
    if isinstance(values, np.ma.MaskedArray):
        raise _refusal(name, expected, "a masked array; pass its values without the masked ones")
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise _refusal(
            name, expected, f"{shown(values)}, which is not an array ({error})"
        ) from error
    if array.dtype.kind not in NUMERIC and array.size:
        raise _refusal(name, expected, f"{shown(values)}, of {array.dtype} in numpy")
    # torch has neither foreign byte orders, nor numbers of 16 bytes, nor all unsigned ones
    native = array.dtype.newbyteorder("=")
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        native = np.dtype(np.float64)
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        is_large = array.size > 0 and array.max() >= 2**63
        native = np.dtype(np.float64 if is_large else np.int64)
    return torch.from_numpy(np.array(array, dtype=native))


def _refusal(name: str, expected: str, got: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"`{name}` must be {expected}; got {got}")


def _real(values: Values, name: str, shape: str) -> Tensor:
    expected = f"real numbers {shape}"
    tensor = as_tensor(values, name, expected)
    if tensor.dtype == torch.bool and tensor.numel():
        raise _refusal(name, expected, f"booleans of shape {list(tensor.shape)}")
    return tensor.to(torch.float64)


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
    tensor = as_tensor(values, name, f"booleans {shape}")
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
    tensor = as_tensor(labels, name, f"classes, {n} integers")
    if tensor.shape != (n,) or tensor.is_floating_point():
        raise InvalidArgumentError(
            f"`{name}` has shape {list(tensor.shape)} and {tensor.dtype}; expected one class, an "
            f"integer, for each of the {n} examples"
        )
    return tensor.long()


def subset_masks(subsets: Values, n: int | None = None) -> Tensor:
    """Which examples each subset has, bool ``[S, n]`` on the CPU.

    Args:
        subsets: booleans, or 0 and 1, ``[S, n]``.
        n: the number of examples, if it is known.

    Raises:
        InvalidArgumentError: for other values or shapes, or a subset that is empty.
    """
    meaning = "one row per subset, True where it has the training example (masks, not indices)"
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


def subset_weights(subsets: Values, n: int) -> Tensor:
    """How much each example counts in each training, float64 ``[S, n]`` on the CPU.

    Args:
        subsets: as ``subset_masks`` has them, or weights, floating-point numbers. Integers
            other than 0 and 1 are refused: they may be indices.
        n: how many examples there are.

    Raises:
        InvalidArgumentError: for other shapes, values that are not finite, or an empty subset.
    """
    tensor = as_tensor(subsets, "subsets", f"booleans or weights [S, {n}]")
    if not tensor.is_floating_point() or bool(((tensor == 0) | (tensor == 1)).all()):
        return subset_masks(tensor, n).double()
    weights = numbers(tensor, "subsets", f"[S, {n}]")
    if weights.shape[1] != n:
        raise InvalidArgumentError(
            f"`subsets` has shape {list(weights.shape)}; expected [S, {n}]: one row per training, "
            "the weight of each training example in it"
        )
    return weights


def indices_in(indices: Values, n: int, name: str = "indices") -> Tensor:
    """Indices of examples in a training set of n, int64 ``[k]``, one or more."""
    tensor = as_tensor(indices, name, "integers [k]")
    whole = not (tensor.is_floating_point() or tensor.dtype == torch.bool)
    if tensor.dim() != 1 or len(tensor) == 0 or not whole:
        raise InvalidArgumentError(
            f"`{name}` has shape {list(tensor.shape)} and {tensor.dtype}; expected integers [k], "
            "one or more"
        )
    outside = tensor[(tensor < 0) | (tensor >= n)]
    if len(outside):
        raise InvalidArgumentError(
            f"`{name}` holds {int(outside[0])}; the training set has {n} examples, 0 to {n - 1}"
        )
    return tensor.long()


def count_of(share: float, n: int) -> int:
    """A share of n examples as a whole number, halves up."""
    return int(check_number(share, "fraction", most=2**31) * n + 0.5)


def standard_error(values: Tensor, dim: int = 0) -> Tensor | None:
    """The standard error of a mean of independent values along ``dim``; None for a single one."""
    count = values.shape[dim]
    return None if count < 2 else values.std(dim=dim) / count**0.5
