"""From two sides of a method to the scores that are kept."""

from influence_kit.scoring.term import Side, Term
from influence_kit.scoring.transforms import unit_norm

__all__ = ["Side", "Term", "unit_norm"]
