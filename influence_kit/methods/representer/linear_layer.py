"""The layer that is refitted: its parameters, and how many outputs it has."""

from collections.abc import Mapping, Sequence

from torch import nn

from influence_kit.core.dtypes import has_complex
from influence_kit.errors import InvalidArgumentError
from influence_kit.gradients.parameter_selection import choose_parameters
from influence_kit.gradients.rules import linear, rule_for, transposed_linear


def linear_parameters(model: nn.Module, layers: Sequence[str] | None) -> Mapping[str, nn.Parameter]:
    """The parameters of the last layer, which must be linear and real."""
    assert layers is not None
    name, layer = layers[0], model.get_submodule(layers[0])
    if rule_for(layer) not in (linear, transposed_linear):
        raise InvalidArgumentError(f"`final_fc_layer` must be a linear layer; '{name}' is {layer}")
    if has_complex(layer):
        raise InvalidArgumentError(
            f"`final_fc_layer` '{name}' has complex parameters, which the refit does not "
            "support; use a method of gradients such as `TracInCPFast`"
        )
    return choose_parameters(model, layers)


def output_count(layer: nn.Module) -> int:
    """The number of outputs of a linear layer."""
    weight = layer.get_parameter("weight")
    return weight.shape[0 if rule_for(layer) is linear else 1]
