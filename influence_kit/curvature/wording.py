"""The words with which errors describe the matrix that a method inverts."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Wording:
    """Words for errors; the defaults are those of influence functions.

    Args:
        matrix: the matrix that is inverted.
        damping: the name of the argument that is added to its eigenvalues.
        data: the data that it is computed from.
    """

    matrix: str = "the curvature"
    damping: str = "damping"
    data: str = "`hessian_dataset` (the training set where None)"


OF_CURVATURE = Wording()
