"""What errors call the matrix that a method inverts, and what it is made of."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Wording:
    """The words of a method's own users; those of influence functions, unless it says otherwise.

    Args:
        matrix: what is inverted.
        block: a block of it, ``{}`` its name.
        damping: the argument that is added to its eigenvalues.
        data: what it is measured on.
        remedy: what helps against negative eigenvalues.
    """

    matrix: str = "the curvature"
    block: str = "the curvature of block '{}'"
    damping: str = "damping"
    data: str = "`hessian_dataset` (the training set where None)"
    remedy: str = "curvature='ggn', which has no negative eigenvalues"


OF_CURVATURE = Wording()
