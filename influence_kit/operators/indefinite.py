"""The error about a damped block that is not positive definite, in the words of the caller."""

from torch import Tensor

from influence_kit.errors import CurvatureError

GGN = "curvature='ggn', which has no negative eigenvalues"


class IndefiniteBlockError(CurvatureError):
    """A damped block that is singular or has negative eigenvalues.

    Attributes:
        eigenvalues: those of the block without the damping, float64.
        damping: the number that was added to them.
    """

    eigenvalues: Tensor
    damping: float


def indefinite(
    eigenvalues: Tensor,
    damping: float,
    matrix: str = "the block",
    argument: str = "damping",
    remedy: str = GGN,
) -> IndefiniteBlockError:
    """The error.

    Args:
        eigenvalues: those of the block without the damping.
        damping: the number that was added to them.
        matrix: what the block is.
        argument: the name of the argument that was added.
        remedy: what to do about negative eigenvalues.
    """
    least, most = float(eigenvalues.min()), float(eigenvalues.max())
    negative = int((eigenvalues < -1e-12 * max(abs(least), abs(most))).sum())
    what = f"has {negative} negative eigenvalues" if negative else "is singular"
    error = IndefiniteBlockError(
        f"{matrix} {what}: its {len(eigenvalues)} eigenvalues go from {least:.4g} to {most:.4g}, "
        f"and {argument} {damping:.4g} does not make it positive definite. "
        f"Use a {argument} above {max(-least, 0) + 1e-8 * abs(most):.3g}"
        + (f", or {remedy}" if negative else "")
    )
    error.eigenvalues, error.damping = eigenvalues, damping
    return error
