"""Parameter groups that are projected together: a layer's matrix with its bias, or one parameter.

Shapes: o outputs and i inputs (with the bias) of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from influence_kit.core.dtypes import has_complex, real_shape
from influence_kit.gradients.rules import convolution, linear, rule_for, transposed_linear


@dataclass(frozen=True)
class Unit:
    """A group of parameters that are projected together.

    Unlike a ``MatrixLayer`` it may be any matrix, or a vector, which has only one side to project.
    The groups of a convolution are rows of one matrix, and a bias may also be used elsewhere.

    Args:
        names: the name of the weight, then that of the bias if there is one.
        outputs: the number of outputs o; 0 if it is not a matrix.
        inputs: the number of inputs i.
        transposed: whether the weight is stored as (inputs, outputs).
    """

    names: tuple[str, ...]
    outputs: int
    inputs: int
    transposed: bool = False

    @property
    def is_matrix(self) -> bool:
        """Whether there are two sides to project."""
        return self.outputs > 0

    @property
    def bias(self) -> str | None:
        """The name of the bias, or None."""
        return self.names[1] if len(self.names) > 1 else None


def units_of(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> list[Unit]:
    """The groups of the chosen parameters, in their order."""
    units = [_unit_of(name, model, parameters) for name in parameters]
    # a bias may come before its weight
    joined = {unit.bias for unit in units}
    return [unit for unit in units if unit.names[0] not in joined]


def _unit_of(name: str, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Unit:
    """The group of a parameter: the parameter and those projected with it."""
    owner, _, attribute = name.rpartition(".")
    layer, shape = model.get_submodule(owner), real_shape(parameters[name])
    rule = rule_for(layer)
    bias = f"{owner}.bias".removeprefix(".")
    has_matrix = rule in (linear, convolution, transposed_linear) and attribute == "weight"
    # the parameters of complex layers are pairs of real numbers
    has_matrix = has_matrix and not has_complex(layer)
    names = (name, bias) if has_matrix and bias in parameters else (name,)
    rows, columns = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (0, 0)
    transposed = has_matrix and rule is transposed_linear
    outputs, inputs = (columns, rows) if transposed else (rows, columns)
    return Unit(names, outputs, inputs + len(names) - 1, transposed)
