"""What operators, products and inverses refuse, with what to pass."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from influence_kit.errors import InvalidArgumentError
from influence_kit.operators import (
    Cholesky,
    EigenPairs,
    JacobiPreconditioner,
    LowRank,
    NystromPreconditioner,
    Operator,
    gauss_newton_product,
    hessian,
    hessian_product,
)

DOUBLE = torch.float64
EYE = torch.eye(2, dtype=DOUBLE)
POINT, VECTORS = {"x": torch.zeros(2)}, {"x": torch.ones(3, 2)}


def energy(tree: Any) -> Tensor:
    return tree["x"].square().sum()


class Twice(Operator):
    """2 I."""

    def product(self, vectors: Tensor) -> Tensor:
        return 2 * vectors


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: Cholesky([], 0.1), "`blocks` is empty; pass one or more of square matrices"),
    (lambda: Cholesky([EYE[0]], 0.1), r"`blocks\[0\]` must be a tensor \[P, P\] of floats; got"),
    (lambda: Cholesky([EYE.long()], 0.1), r"`blocks\[0\]` must be a tensor \[P, P\] of floats"),
    (lambda: Cholesky([EYE[:1]], 0.1), r"`blocks\[0\]` has shape \[1, 2\]; expected \[P, P\]"),
    (lambda: Cholesky([EYE * torch.nan], 0.1), r"`blocks\[0\]` holds a NaN or an infinite number"),
    (lambda: Cholesky([EYE], 0.1, ["a", "b"]), "`names` has 2 items; there must be 1"),
    (lambda: Cholesky([EYE], 0.1)(torch.ones(2)), r"`vectors` must have shape \[k, 2\]; got \[2\]"),
    (lambda: EigenPairs(torch.ones(3), EYE), "there are 3 eigenvalues and 2 eigenvectors"),
    (lambda: EigenPairs(None, EYE), r"`values` must be a tensor \[r\] of floats"),  # type: ignore[arg-type]
    (lambda: EigenPairs(torch.ones(2), EYE / 0), "`vectors` holds a NaN or an infinite number"),
    (lambda: LowRank([EYE], 0.1, True), r"`pairs\[0\]` must be EigenPairs, as `arnoldi` and"),  # type: ignore[list-item]
    (lambda: LowRank([], 0.1, True), "`pairs` is empty; pass one or more of EigenPairs"),
    (lambda: Twice([], EYE), "`sizes` is empty; pass one or more of numbers of rows"),
    (lambda: Twice([2, 0], EYE), r"`sizes\[1\]` must be a positive int; got 0"),
    (lambda: Twice([2], None), "`sample` must be a tensor with the dtype and device of vectors"),  # type: ignore[arg-type]
    (lambda: Twice([2], EYE).signs(0, 0), "`count` must be a positive int; got 0"),
    (lambda: Twice([2], EYE).normal(2**21, 0), "`count` must be a positive int and at most 104857"),
    (lambda: hessian_product(energy, POINT, VECTORS, "sideways"), '`mode` must be "forward" or'),  # type: ignore[arg-type]
    (lambda: hessian_product(None, POINT, VECTORS), "`function` must be a function, called as fun"),  # type: ignore[arg-type]
    (
        lambda: hessian_product(energy, {}, VECTORS),
        "`parameters` must be a dict of tensors of floa",
    ),
    (lambda: hessian_product(energy, POINT, {"x": 1}), "`vectors` must be a dict of tensors of f"),  # type: ignore[dict-item]
    (
        lambda: hessian_product(energy, POINT, {"x": torch.ones(3, 4)}),
        r"`vectors` must have k vectors for each of the parameters \{'x': \[2\]\}, .*\[3, 4\]",
    ),
    (
        lambda: gauss_newton_product(energy, None, POINT, VECTORS),  # type: ignore[arg-type]
        "`loss` must be a function, called as loss",
    ),
]


@pytest.mark.parametrize(("call", "told"), REFUSED, ids=[told for _, told in REFUSED])
def test_what_does_not_fit_is_refused(call: Callable[[], Any], told: str) -> None:
    with pytest.raises(InvalidArgumentError, match=told):
        call()


@pytest.mark.parametrize("kind", [JacobiPreconditioner, NystromPreconditioner])
def test_preconditioners_take_vectors_of_their_size(kind: Any) -> None:
    operator = hessian(lambda x: x.square().sum(), torch.zeros(3))
    made = kind(operator, 0.1, *([2] if kind is NystromPreconditioner else []))
    with pytest.raises(InvalidArgumentError, match=r"`vectors` must have shape \[k, 3\]; got \[2"):
        made(torch.ones(2, 2))
