"""From the test and training gradients of a method to its scores."""

from influence_kit.scoring.adam_directions import AdamDirections
from influence_kit.scoring.term import Side, Term
from influence_kit.scoring.transforms import unit_norm

__all__ = ["AdamDirections", "Side", "Term", "unit_norm"]
