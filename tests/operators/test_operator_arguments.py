"""What is no operator, vector, point or damping is refused, with what there is."""

import numpy as np
import pytest
import torch

from influence_kit.errors import InvalidArgumentError
from influence_kit.operators import (
    JacobiPreconditioner,
    NystromPreconditioner,
    arnoldi,
    conjugate_gradients,
    hessian,
    inverse,
    largest_eigenvalue,
    lissa,
    nystrom,
)

OPERATOR = hessian(lambda x: x.square().sum(), torch.ones(3))
ONES = torch.ones(2, 3)


@pytest.mark.parametrize(
    "call",
    [
        lambda c: conjugate_gradients(c, ONES, 0.1),
        lambda c: lissa(c, ONES, 0.1),
        lambda c: arnoldi(c, 2),
        lambda c: nystrom(c, 2),
        lambda c: inverse(c),
        lambda c: largest_eigenvalue(c),
        lambda c: JacobiPreconditioner(c, 0.1),
        lambda c: NystromPreconditioner(c, 0.1, 2),
    ],
)
def test_a_matrix_is_no_operator(call):
    with pytest.raises(InvalidArgumentError, match=r"`operator` must be an influence_kit"):
        call(torch.eye(3))


@pytest.mark.parametrize(
    ("vectors", "match"),
    [
        (None, r"`vectors` must be a tensor \[k, 3\] of floats; got None"),
        (torch.ones(2, 3, dtype=torch.long), "of floats; got tensor"),
        (torch.ones(2, 3).to_sparse(), "of floats; got tensor"),
        (torch.ones(2, 4), r"must have shape \[k, 3\]; got \[2, 4\]"),
        (torch.ones(3), r"must have shape \[k, 3\]; got \[3\]"),
    ],
)
def test_vectors(vectors, match):
    for call in (conjugate_gradients, lissa):
        with pytest.raises(InvalidArgumentError, match=match):
            call(OPERATOR, vectors, 0.1)
    with pytest.raises(InvalidArgumentError, match=match):
        OPERATOR.product(vectors)


@pytest.mark.parametrize("damping", [None, "text", [None], np.array(["a"]), True, 10**30, 1j])
def test_dampings(damping):
    with pytest.raises(InvalidArgumentError, match="damping must be a number, or one per block"):
        conjugate_gradients(OPERATOR, ONES, damping)


@pytest.mark.parametrize("point", [None, 3, {}, [1.0], torch.ones(3, dtype=torch.long), {3: ONES}])
def test_points(point):
    with pytest.raises(InvalidArgumentError, match="`parameters` must be a tensor of floats"):
        hessian(torch.sum, point)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: hessian(3, ONES), "`function` must be a function"),
        (lambda: hessian(torch.sum, ONES, mode=3), '`mode` must be "forward" or "reverse"; got 3'),
        (lambda: inverse(OPERATOR, np.array(["cg"])), '`solver` must be "cholesky"'),
        (lambda: arnoldi(OPERATOR, 2, seed=1.5), "a seed must be an int; got 1.5"),
        (lambda: largest_eigenvalue(OPERATOR, 0), "`iterations` must be a positive int; got 0"),
        (lambda: lissa(OPERATOR, ONES, 0.1, repeats=10**30), "at most 1000000000; got"),
        (
            lambda: conjugate_gradients(OPERATOR, ONES, 0.1, preconditioner=3),
            "`preconditioner` must be a function",
        ),
    ],
)
def test_other_arguments(call, match):
    with pytest.raises(InvalidArgumentError, match=match):
        call()
