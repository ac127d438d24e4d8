"""The parameters whose gradients a method takes, and their groups by layer."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from influence_kit.core.arguments import shown
from influence_kit.core.objects import is_one_of
from influence_kit.errors import InvalidArgumentError


def choose_parameters(model: nn.Module, layers: Sequence[str] | None) -> dict[str, nn.Parameter]:
    """The parameters of the layers, by name; without layers all that require a gradient.

    A frozen parameter of a named layer counts, with a warning; it is frozen again afterwards.

    Raises:
        InvalidArgumentError: if there are none.
    """
    if layers is None:
        chosen = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not chosen:
            raise InvalidArgumentError(
                "no parameter of the model requires a gradient; name the `layers` to look at"
            )
        return chosen
    inside = {
        parameter: layer
        for layer in layers
        for parameter in model.get_submodule(layer).parameters()
    }
    chosen = {name: p for name, p in model.named_parameters() if p in inside}
    if not chosen:
        raise InvalidArgumentError(f"the layers {list(layers)} have no parameters")
    for name, parameter in chosen.items():
        if not parameter.requires_grad:
            warnings.warn(
                f"Setting required grads for layer: {inside[parameter]}, name: {name} (while "
                "scores are computed; it is frozen again afterwards)",
                stacklevel=4,
            )
    return chosen


def group_by_layer(
    model: nn.Module, names: Sequence[str], layers: Sequence[str] | None
) -> Mapping[str, list[str]]:
    """Names of parameters by layer: by the given layers, or by the modules that own them.

    A parameter of the model itself is a group of its own, under its name; a model that is one layer
    is one group, under the name of its class.
    """
    if layers is None and not list(model.children()):
        return {type(model).__name__: list(names)}
    inside = {layer: set(model.get_submodule(layer).parameters()) for layer in layers or ()}
    groups: dict[str, list[str]] = {}
    for name in names:
        # a tied parameter has the name of its first use, which may be in another layer
        parameter = model.get_parameter(name)
        owners = (layer for layer, parameters in inside.items() if parameter in parameters)
        owner = next(owners, name.rpartition(".")[0] or name)
        groups.setdefault(owner, []).append(name)
    return groups


def choose_blocks(model: nn.Module, names: Sequence[str], blocks: Any) -> Mapping[str, list[str]]:
    """Names of parameters by block of a curvature.

    Args:
        model: the model.
        names: the chosen parameters.
        blocks: "full", "layer" (the modules that own parameters), "parameter", or names by block.
    """
    if is_one_of(blocks, ("full",)):
        return {"full": list(names)}
    if is_one_of(blocks, ("layer",)):
        return group_by_layer(model, names, None)
    if is_one_of(blocks, ("parameter",)):
        return {name: [name] for name in names}
    if not isinstance(blocks, Mapping) or not blocks:
        raise InvalidArgumentError(
            '`blocks` must be "full", "layer", "parameter", or a dict of block names to lists of '
            f"parameter names; got {shown(blocks)}"
        )
    seen: list[str] = []
    for block, own in blocks.items():
        known = isinstance(own, list | tuple) and all(name in names for name in own)
        if not known or not own:
            raise InvalidArgumentError(
                f"block '{block}' must be a list of names of chosen parameters; got {shown(own)}, "
                f"and there are {list(names)}"
            )
        seen += own
    twice = sorted({name for name in seen if seen.count(name) > 1})
    if twice:
        raise InvalidArgumentError(f"the parameters {twice} occur more than once in `blocks`")
    return {block: list(own) for block, own in blocks.items()}
