"""Logistic regression, ridge regression and multilayer perceptrons."""

from collections.abc import Sequence
from itertools import pairwise

from torch import nn


def linear(inputs: int, outputs: int) -> nn.Sequential:
    """One linear layer with bias, on inputs of any shape: logistic or linear regression."""
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, outputs))


def perceptron(widths: Sequence[int], dropout: float = 0.0) -> nn.Sequential:
    """Linear layers between these widths (inputs first, outputs last), ReLU between them.

    Args:
        widths: of the inputs, the hidden layers and the outputs.
        dropout: probability, after every ReLU; 0 for none.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    for place, (inputs, outputs) in enumerate(pairwise(widths)):
        if place:
            layers += [nn.ReLU(), nn.Dropout(dropout)] if dropout else [nn.ReLU()]
        layers.append(nn.Linear(inputs, outputs))
    return nn.Sequential(*layers)
