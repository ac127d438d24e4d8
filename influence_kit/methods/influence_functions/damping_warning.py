"""Warns of a damping that is far too small, once per fit."""

import warnings

from influence_kit.core.distributed import is_first_rank
from influence_kit.errors import DampingWarning
from influence_kit.methods.influence_functions.damping_check import (
    LEAST_OF_LAYERS,
    LEAST_OF_WHOLE,
    DampingCheck,
    Figures,
    advice,
)
from influence_kit.methods.influence_functions.fitted_inverse import FittedInverse


def damping_watch(fitted: FittedInverse, train_count: int, method: str) -> DampingCheck | None:
    """The observer of a pass that warns if its scores look poor; None if none is needed.

    Args:
        fitted: the inverse curvature.
        train_count: the number of training examples; 0 if unknown.
        method: the name of the method, for the warning.
    """
    if fitted.cache.is_compared or not is_first_rank():
        return None

    def tell(figures: Figures | None) -> None:
        if figures is None:
            return
        fitted.cache.is_compared = True
        least = LEAST_OF_WHOLE if fitted.inverse.couples_layers else LEAST_OF_LAYERS
        if figures.are_below(least):
            text = advice(figures, method, fitted.damping_text, fitted.is_auto)
            warnings.warn(text, DampingWarning, stacklevel=2)

    return DampingCheck(train_count, tell)
