"""The arguments of ``BatchedSGD``, checked before hours of training."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from influence_kit.core.arguments import (
    check_count,
    check_flag,
    check_function,
    check_number,
    check_seeds,
    check_sequence,
    shown,
)
from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation.arrays import indices_in

MOST = 2**31 - 1  # epochs, examples per batch


def check_settings(sgd: Any) -> None:
    """Refuse functions, numbers and data that cannot be trained with."""
    check_function(sgd.make_model, "make_model", "make_model() -> model")
    check_function(sgd.loss_fn, "loss_fn", "loss_fn(outputs, targets) -> scalar")
    check_flag(sgd.same_batches, "same_batches")
    for name in ("epochs", "batch_size"):
        check_count(getattr(sgd, name), name, most=MOST)
    if not isinstance(sgd.at_once, str) or sgd.at_once != "auto":
        check_count(sgd.at_once, "at_once", instead='"auto"', most=MOST)
    check_number(sgd.learning_rate, "learning_rate", above=0)
    check_number(sgd.momentum, "momentum", least=0, below=1)
    check_number(sgd.weight_decay, "weight_decay", least=0)
    for name in ("inputs", "targets"):
        _check_examples(getattr(sgd, name), name)
    if len(sgd.inputs) != len(sgd.targets):
        raise InvalidArgumentError(
            f"got {len(sgd.inputs)} inputs and {len(sgd.targets)} targets; there must be one "
            "target per input"
        )


def _check_examples(values: Any, name: str) -> None:
    is_tensor = isinstance(values, Tensor) and values.dim() > 0 and not values.is_meta
    if not is_tensor or values.layout != torch.strided or len(values) == 0:
        raise InvalidArgumentError(
            f"`{name}` must be a dense tensor [n, ...], one row per training example; got "
            f"{shown(values)}"
        )


def check_new_model(model: Any) -> nn.Module:
    """What ``make_model`` returned, which must be a module."""
    if not isinstance(model, nn.Module):
        raise InvalidArgumentError(
            f"`make_model` returned {shown(model)}; it must return a new torch.nn.Module"
        )
    return model


def check_subsets(
    subsets: Sequence[Tensor], seeds: Sequence[int], n: int
) -> tuple[list[Tensor], list[int]]:
    """Subsets of one size, as int64 indices, and a seed for each.

    Raises:
        InvalidArgumentError: for indices outside the n training examples, subsets of different
            sizes, or another number of seeds.
    """
    seeds = check_seeds(seeds)
    checked = [
        indices_in(subset, n, f"subsets[{number}]")
        for number, subset in enumerate(check_sequence(subsets, "subsets", "indices of examples"))
    ]
    sizes = sorted({len(subset) for subset in checked})
    if len(sizes) != 1 or len(checked) != len(seeds):
        raise InvalidArgumentError(
            f"got {len(checked)} subsets of sizes {sizes} and {len(seeds)} seeds; models that are "
            "trained at once need subsets of one size, and one seed each"
        )
    return checked, seeds


def check_epochs(epochs: Any, most: int) -> list[int]:
    """Ascending epochs from 1 to ``most``, at least one."""
    given = list(check_sequence(epochs, "epochs", "ints"))
    whole = all(isinstance(e, int | np.integer) and not isinstance(e, bool) for e in given)
    if not whole or not given or given != sorted({*given} & {*range(1, most + 1)}):
        raise InvalidArgumentError(
            f"`epochs` is {given}; it must be one or more of 1 to {most}, ascending"
        )
    return given
