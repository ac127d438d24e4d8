"""Linear maps: curvature as products with vectors, and its inverses."""

from influence_kit.operators.functions import fisher, gauss_newton, hessian, inverse
from influence_kit.operators.low_rank import (
    EigenPairs,
    JacobiPreconditioner,
    LowRank,
    NystromPreconditioner,
    arnoldi,
    nystrom,
)
from influence_kit.operators.operator import Operator
from influence_kit.operators.products import gauss_newton_product, hessian_product
from influence_kit.operators.solvers import (
    Cholesky,
    conjugate_gradients,
    largest_eigenvalue,
    lissa,
)

__all__ = [
    "Cholesky",
    "EigenPairs",
    "JacobiPreconditioner",
    "LowRank",
    "NystromPreconditioner",
    "Operator",
    "arnoldi",
    "conjugate_gradients",
    "fisher",
    "gauss_newton",
    "gauss_newton_product",
    "hessian",
    "hessian_product",
    "inverse",
    "largest_eigenvalue",
    "lissa",
    "nystrom",
]
