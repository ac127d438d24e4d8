"""The words with which errors describe the matrix that a method inverts."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Wording:
    """Words for errors; the defaults are those of influence functions.

    Args:
        matrix: the matrix that is inverted.
        block: a block of it, with ``{}`` for its name.
        damping: the name of the argument that is added to its eigenvalues.
        data: the data that it is computed from.
        remedy: what helps against negative eigenvalues.
    """

    matrix: str = "the curvature"
    block: str = "the curvature of block '{}'"
    damping: str = "damping"
    data: str = "`hessian_dataset` (the training set where None)"
    remedy: str = "curvature='ggn', which has no negative eigenvalues"


OF_CURVATURE = Wording()
