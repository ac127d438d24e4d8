"""What a rule returns: forms of the parameters of its layer, for the examples that it was given."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from influence_kit.core.arguments import shown
from influence_kit.core.dtypes import real_shape
from influence_kit.errors import InvalidArgumentError
from influence_kit.gradients.form import Form


def checked_result(
    found: Any, layer: nn.Module, names: Mapping[str, str], n: int
) -> dict[str, Form]:
    """The forms that a rule has returned, by parameter name.

    Args:
        found: what it has returned.
        layer: of which.
        names: the names of its chosen parameters, by attribute.
        n: how many examples there are.

    Raises:
        InvalidArgumentError: for anything but a dict of forms, or forms of other shapes.
    """
    kind = type(layer).__name__
    if not isinstance(found, Mapping):
        raise InvalidArgumentError(
            f"the gradient rule of {kind} must return a dict of forms by the names of its "
            f"parameters, {list(names)}; got {shown(found)}"
        )
    forms = {name: found[attribute] for attribute, name in names.items() if attribute in found}
    for attribute in names.keys() & found.keys():
        form, shape = found[attribute], real_shape(getattr(layer, attribute))
        if not isinstance(form, Form):
            raise InvalidArgumentError(
                f"the gradient rule of {kind} returns {shown(form)} for '{attribute}'; it must be "
                "a Dense, a Factored or another form of influence_kit.gradients"
            )
        if (form.n, form.shape) != (n, shape):
            raise InvalidArgumentError(
                f"the gradient rule of {kind} returns gradients of {form.n} examples with shape "
                f"{list(form.shape)} for '{attribute}'; it was given {n} examples, and the "
                f"parameter has shape {list(shape)}"
            )
    return forms
