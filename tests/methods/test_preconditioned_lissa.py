"""LiSSA with a preconditioner: the exact solution where all examples are used, and near it else."""

from pathlib import Path
from typing import Any

import pytest
import torch
from contract import assert_close
from test_cg_preconditioners import EXACT, TEST, make
from torch import Tensor

from influence_kit import EKFACInfluenceFunction, LiSSAInfluenceFunction
from influence_kit.curvature import EKFAC, Explicit
from influence_kit.errors import InvalidArgumentError


def scores(**arguments: Any) -> Tensor:
    arguments = {"hessian_batch_size": None, "recursion_depth": 400, **arguments}
    return make(LiSSAInfluenceFunction, **arguments).influence(TEST)


def error(found: Tensor) -> float:
    return float((found - EXACT).norm() / EXACT.norm())


@pytest.mark.parametrize("preconditioner", ["auto", "sample", "nystrom", EKFAC(rtol=0.0)])
def test_the_scores_are_the_exact_ones(preconditioner: Any) -> None:
    depth = 2000 if isinstance(preconditioner, EKFAC) else 400
    assert_close(scores(preconditioner=preconditioner, recursion_depth=depth), EXACT, 1e-4)


def test_an_exact_inverse_needs_one_iteration() -> None:
    assert_close(scores(preconditioner=Explicit(), recursion_depth=1, scale=1.0), EXACT, 1e-8)


def test_few_iterations_are_nearer_than_a_long_plain_series() -> None:
    """30 iterations of 16 of the 120 examples are four passes."""
    few = scores(preconditioner="ekfac", recursion_depth=30, hessian_batch_size=16)
    ekfac = make(EKFACInfluenceFunction).influence(TEST)
    plain = scores(recursion_depth=1000, hessian_batch_size=16)
    assert error(few) < 0.6 * min(error(plain), error(ekfac))


def test_another_methods_fit_is_used_and_saved(tmp_path: Path) -> None:
    ekfac = make(EKFACInfluenceFunction)
    ekfac.influence(TEST)
    given = {"hessian_batch_size": None, "recursion_depth": 20}
    own = make(LiSSAInfluenceFunction, preconditioner="ekfac", **given)
    other = make(LiSSAInfluenceFunction, preconditioner=ekfac, **given)
    # the fit of `ekfac` has the seed and products of its class
    assert_close(other.influence(TEST), own.influence(TEST), 1e-2)
    own.save(tmp_path / "fit")
    again = make(LiSSAInfluenceFunction, preconditioner="ekfac", **given).load(tmp_path / "fit")
    assert torch.equal(again.influence(TEST), own.influence(TEST))
    plain = make(LiSSAInfluenceFunction, **given)
    with pytest.raises(InvalidArgumentError, match="preconditioner"):
        plain.load(tmp_path / "fit")


def test_an_unknown_preconditioner_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match=r"`preconditioner` must be None, \"auto\""):
        make(LiSSAInfluenceFunction, preconditioner="astra")


def test_the_default_is_the_plain_series() -> None:
    expected = make(LiSSAInfluenceFunction, damping=0.3, recursion_depth=9).influence(TEST)
    found = scores(damping=0.3, recursion_depth=9, hessian_batch_size=64, preconditioner=None)
    assert torch.equal(found, expected)
