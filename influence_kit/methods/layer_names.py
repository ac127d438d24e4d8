"""The names of the modules that a `layers` argument selects."""

from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from influence_kit.core.arguments import shown
from influence_kit.core.objects import check_model
from influence_kit.errors import InvalidArgumentError, UnknownLayerError

Layers = str | nn.Module | Sequence[str | nn.Module]
# the largest number of names that an error shows
SHOWN = 10


def check_layers(model: nn.Module, layers: Any) -> list[str] | None:
    """The names of layers, each of them a module of the model; None for the whole model.

    Args:
        model: the model.
        layers: a name, a module of the model, a pattern of names ("*" any characters, also dots;
            "?" one; "[ab]" one of these; an existing name is taken literally), or a list of these.

    Raises:
        UnknownLayerError: for layers that the model does not have, with similar names.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
        >>> check_layers(model, ["[02]"]), check_layers(model, model[1])
        (['0', '2'], ['1'])
    """
    check_model(model)
    if layers is None:
        return None
    if isinstance(layers, str | nn.Module):
        layers = [layers]
    if not isinstance(layers, list | tuple):
        raise InvalidArgumentError(
            "`layers` should be a list! (of names, patterns and modules; or one of them) got a "
            f"{type(layers).__name__}: {shown(layers)}"
        )
    if not layers:
        raise InvalidArgumentError(
            "`layers` cannot be empty! Leave it out to use all parameters of the model"
        )
    if not all(isinstance(layer, str | nn.Module) for layer in layers):
        raise InvalidArgumentError(
            f"`layers` should contain str layer names. got {shown(layers)}; a pattern such as "
            '"*.attention" or a module of the model is accepted, too'
        )
    names = dict(model.named_modules())
    found = [(layer, _matches(names, layer)) for layer in layers]
    unknown = [layer for layer, some in found if not some]
    if unknown:
        _refuse(names, unknown)
    return list(dict.fromkeys(name for _, some in found for name in some))


def check_layer(model: nn.Module, layer: str | nn.Module) -> str:
    """The name of one layer, given as its name or as the module."""
    names = check_layers(model, [layer]) or []
    if len(names) != 1:
        raise InvalidArgumentError(
            f"expected one layer; '{layer}' matches {len(names)}: {_shortened(names)}"
        )
    return names[0]


def _matches(names: dict[str, nn.Module], layer: str | nn.Module) -> list[str]:
    if isinstance(layer, nn.Module):
        return [name for name, module in names.items() if module is layer]
    if layer in names:
        return [layer]
    # a pattern does not match the model itself, whose name is empty
    return [name for name in names if name and fnmatchcase(name, layer)]


def _refuse(names: dict[str, nn.Module], unknown: list[str | nn.Module]) -> None:
    there = [name for name in names if name]
    modules = [type(layer).__name__ for layer in unknown if isinstance(layer, nn.Module)]
    if modules:
        raise UnknownLayerError(
            f"`layers` has modules that are not in the model: {_shortened(modules)}; it has "
            f"{len(there):,} modules, such as {_shortened(there)}"
        )
    words = [str(layer) for layer in unknown]
    if not there:
        raise UnknownLayerError(
            f"the model has no layers {_shortened(words)}: it is one layer itself, a "
            f"{type(names['']).__name__} without submodules; leave `layers` out"
        )
    if len(there) <= SHOWN:
        raise UnknownLayerError(f"the model has no layers {_shortened(words)}; it has {there}")
    near = [name for word in words[:SHOWN] for name in get_close_matches(word, there, cutoff=0.5)]
    near = list(dict.fromkeys(near))[:SHOWN] or there[:SHOWN]
    raise UnknownLayerError(
        f"the model has no layers {_shortened(words)}; it has {len(there):,} modules; "
        f"similar names are {near}"
    )


def _shortened(names: list[str]) -> str:
    more = len(names) - SHOWN
    return str(names[:SHOWN]) + (f" and {more:,} more" if more > 0 else "")
