"""Checks of what operators, products and inverses are made of: matrices, functions, points."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from influence_kit.core.arguments import check_function, check_sequence, shown
from influence_kit.core.objects import is_one_of
from influence_kit.errors import InvalidArgumentError


def is_dense(value: Any) -> bool:
    """Whether it is a tensor with numbers: neither sparse nor on the meta device."""
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta


def check_matrix(value: Any, name: str, wanted: str, columns: int | None = None) -> Tensor:
    """The argument, which must be a dense matrix of finite floats.

    Args:
        value: what was given.
        name: the argument's name, for the error.
        wanted: its shape, for the error: "[P, r]".
        columns: how many there must be; None for any number.

    Raises:
        InvalidArgumentError: for anything else.
    """
    if not is_dense(value) or not value.is_floating_point() or value.dim() != 2:
        raise InvalidArgumentError(
            f"`{name}` must be a tensor {wanted} of floats; got {shown(value)}"
        )
    found: Tensor = value
    if columns is not None and found.shape[1] != columns:
        raise InvalidArgumentError(f"`{name}` has shape {list(found.shape)}; expected {wanted}")
    if found.numel() and not all(torch.isfinite(end) for end in torch.aminmax(found)):
        raise InvalidArgumentError(f"`{name}` holds a NaN or an infinite number")
    return found


def check_square(value: Any, name: str) -> Tensor:
    """The argument, which must be a square matrix, ``[P, P]``, of at least one row."""
    found = check_matrix(value, name, "[P, P]")
    if found.shape[0] != found.shape[1] or not len(found):
        raise InvalidArgumentError(f"`{name}` has shape {list(found.shape)}; expected [P, P]")
    return found


def check_blocks(value: Any, name: str, of: str) -> Any:
    """The argument, which must be a sequence of one or more."""
    if not len(check_sequence(value, name, of)):
        raise InvalidArgumentError(f"`{name}` is empty; pass one or more of {of}")
    return value


def check_mode(mode: Any) -> None:
    """Refuse what is not the name of a mode of differentiation."""
    if not is_one_of(mode, ("forward", "reverse")):
        raise InvalidArgumentError(f'`mode` must be "forward" or "reverse"; got {shown(mode)}')


def check_products(functions: Mapping[str, Any], parameters: Any, vectors: Any, mode: Any) -> None:
    """Refuse arguments of a product of a curvature with vectors that do not fit together.

    Args:
        functions: what is differentiated, by the argument's name.
        parameters: tensors by name.
        vectors: of each parameter k, ``[k, *shape]`` by name.
        mode: of differentiation.

    Raises:
        InvalidArgumentError: with the argument that is wrong.
    """
    check_mode(mode)
    for name, function in functions.items():
        check_function(function, name, f"{name}(parameters by name)")
    for name, tree in (("parameters", parameters), ("vectors", vectors)):
        named = isinstance(tree, Mapping) and tree
        if not named or not all(isinstance(k, str) and _is_real(v) for k, v in tree.items()):
            raise InvalidArgumentError(
                f"`{name}` must be a dict of tensors of floats by name; got {shown(tree)}"
            )
    shapes = {name: list(value.shape) for name, value in parameters.items()}
    own = {name: list(value.shape[1:]) if value.dim() else None for name, value in vectors.items()}
    counts = {len(value) for value in vectors.values() if value.dim()}
    if own != shapes or len(counts) != 1 or counts == {0}:
        got = {name: list(value.shape) for name, value in vectors.items()}
        raise InvalidArgumentError(
            f"`vectors` must have k vectors for each of the parameters {shapes}, [k, *shape]; got "
            f"{got}"
        )


def _is_real(value: Any) -> bool:
    return is_dense(value) and (value.is_floating_point() or value.is_complex())
