"""Random projections of gradients: features of layers, and the maps that they are made of."""

from influence_kit.projections.projected import FactMasked, Masked, Projected

__all__ = ["FactMasked", "Masked", "Projected"]
