"""Which entry of an optimizer's state belongs to which parameter of a model.

A state dict of ``torch.optim`` numbers the parameters in the order of its groups, without names.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from influence_kit.errors import InvalidArgumentError

NAMES = "param_names"
# more partial orders than this are not followed
MOST_ORDERS = 1000
Shapes = Mapping[Any, torch.Size]
Orders = dict[tuple[int, ...], list[tuple[Any, ...]]]
REMEDY = "pass `parameter_names`, the names of its parameters in their order"


def indices_by_name(
    model: nn.Module,
    groups: Sequence[Mapping[str, Any]],
    shapes: Shapes,
    names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The index of each of the optimizer's parameters, by the parameter's name in the model.

    Args:
        model: the model.
        groups: the optimizer's parameter groups, each with its indices as "params".
        shapes: the shapes of the parameters that have a state, by index.
        names: the names in the optimizer's order. None takes the names that the groups hold, or
            the order of the model's parameters, group by group.

    Raises:
        InvalidArgumentError: if the optimizer has another number of parameters, or other shapes; if
            several orders fit the shapes.
    """
    every = dict(model.named_parameters())
    indices = [[*group.get("params", ())] for group in groups]
    flat = [index for own in indices for index in own]
    if names is None:
        names = _held_names(groups, every)
    if names is not None:
        return _named(names, flat, every, shapes)
    trained = {name: p for name, p in every.items() if p.requires_grad}
    fitting = [some for some in (trained, every) if len(some) == len(flat)]
    if not fitting:
        raise InvalidArgumentError(
            f"its optimizer has {len(flat)} parameters, and the model has {len(every)}, of which "
            f"{len(trained)} require a gradient; set `requires_grad` as in training, or {REMEDY}"
        )
    return _matched(fitting[0], indices, shapes)


def _held_names(groups: Sequence[Mapping[str, Any]], every: Mapping[str, Any]) -> Any:
    """The names that torch saves if an optimizer was made of named parameters."""
    held = [name for group in groups for name in group.get(NAMES) or [None]]
    return held if all(name in every for name in held) else None


def _named(
    names: Sequence[str], flat: Sequence[Any], every: Mapping[str, Tensor], shapes: Shapes
) -> dict[str, Any]:
    unknown = [name for name in names if name not in every]
    if unknown or len({*names}) != len(flat) or len(names) != len(flat):
        problem = f"no parameter {unknown[0]!r}" if unknown else "one name for each is needed"
        raise InvalidArgumentError(
            f"its optimizer has {len(flat)} parameters, and `parameter_names` are {len(names)} "
            f"names: {problem}; the model has {', '.join(every)}"
        )
    for name, index in zip(names, flat, strict=True):
        if shapes.get(index, every[name].shape) != every[name].shape:
            raise InvalidArgumentError(
                f"its optimizer has the shape {list(shapes[index])} for '{name}', which the model "
                f"has as {list(every[name].shape)}; {REMEDY}"
            )
    return dict(zip(names, flat, strict=True))


def _matched(
    parameters: Mapping[str, Tensor], groups: Sequence[Sequence[Any]], shapes: Shapes
) -> dict[str, Any]:
    """Parameters in the model's order, each the next of one of the groups with its shape."""
    orders: Orders = {(0,) * len(groups): [()]}
    for parameter in parameters.values():
        orders = _longer(orders, parameter.shape, groups, shapes)
        if len(orders) > MOST_ORDERS:
            break
    found = [order for some in orders.values() for order in some]
    if len(found) != 1:
        how = "does not have the shapes of the model's" if not found else "fits them in many orders"
        raise InvalidArgumentError(
            f"its optimizer numbers {len(parameters)} parameters in {len(groups)} groups, and "
            f"{how}; {REMEDY}"
        )
    return dict(zip(parameters, found[0], strict=True))


def _longer(
    orders: Orders, shape: torch.Size, groups: Sequence[Sequence[Any]], shapes: Shapes
) -> Orders:
    """The orders with one more parameter, of a shape; two of each kind show that there is a choice.

    Their keys are how many parameters of each group they have.
    """
    following: Orders = {}
    for taken, some in orders.items():
        for number, group in enumerate(groups):
            place = taken[number]
            if place < len(group) and shapes.get(group[place], shape) == shape:
                after = (*taken[:number], place + 1, *taken[number + 1 :])
                more = [(*order, group[place]) for order in some]
                following[after] = [*following.get(after, ()), *more][:2]
    return following
