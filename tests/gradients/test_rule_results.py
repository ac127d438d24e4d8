"""Rules of users, forms and terms that make no sense."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from influence_kit.core.arguments import refuse_deep
from influence_kit.errors import InvalidArgumentError
from influence_kit.gradients import Dense, Factored, gradient_rule
from influence_kit.gradients.rule_results import checked_result
from influence_kit.methods.tracin.nearest_neighbors import ExactNearestNeighbors
from influence_kit.scoring import Side, Term, unit_norm

LAYER = nn.Linear(2, 3)
NAMES = {"weight": "0.weight", "bias": "0.bias"}
BIAS = Dense(torch.ones(4, 3), torch.Size([3]))


def result(found: Any) -> Any:
    return checked_result(found, LAYER, NAMES, 4)


def index(data: Any, query: Any = None, k: Any = 1) -> Any:
    made = ExactNearestNeighbors()
    made.setup(data)
    return made.get_nearest_neighbors(query, k)


def side(**given: Any) -> Side:
    return Side(**{"checkpoint": 0, "features": id, **given})


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: gradient_rule(int), "a gradient rule is for classes of torch.nn.Module, or their"),
    (lambda: gradient_rule("a.B")(None), "`rule` must be a function, called as rule"),  # type: ignore[arg-type]
    (lambda: result([]), r"the gradient rule of Linear must return a dict of forms .*; got \[\]"),
    (lambda: result({"bias": 1}), "the gradient rule of Linear returns 1 for 'bias'; it must be a"),
    (
        lambda: result({"weight": BIAS}),
        r"returns gradients of 4 examples with shape \[3\] for 'weight'; it was given 4 examples, "
        r"and the parameter has shape \[3, 2\]",
    ),
    (lambda: result({"bias": BIAS.rows(slice(0, 1))}), r"returns gradients of 1 examples with sh"),
    (lambda: Dense([1.0], torch.Size([1])), "`values` of a Dense must be a tensor of 2 dimensions"),  # type: ignore[arg-type]
    (lambda: Dense(torch.ones(2, 2), [2]), "`shape` of a Dense must be a torch.Size, that of the"),  # type: ignore[arg-type]
    (
        lambda: Dense(torch.ones(2, 2), torch.Size([3])),
        r"a Dense of shape \[3\] has 3 values per example; got \[2, 2\]",
    ),
    (
        lambda: Factored(torch.ones(2, 1, 3), torch.ones(2, 1, 4), torch.Size([4, 3])),
        r"a Factored of shape \[4, 3\] needs deltas \[n, t, o\] and inputs \[n, t, i\]; got",
    ),
    (lambda: side(checkpoint=-1), "`checkpoint` must be an int of at least 0; got -1"),
    (lambda: side(features=None), "`features` must be a function, called as features"),
    (lambda: side(transforms=[id]), "`transforms` must be a tuple of functions; got"),
    (lambda: side(transforms=(1,)), "`transforms` must be a function, called as transform"),
    (lambda: side(solve=1), "`solve` must be a function, called as transform"),
    (lambda: Term(side(), None), "`train` must be a Side, as `test_at` and `train_at` return it"),  # type: ignore[arg-type]
    (lambda: Term(side(), side(), "rate"), '`weight` must be a finite number or "learning rate"'),  # type: ignore[arg-type]
    (lambda: unit_norm(BIAS), "`unit_norm` takes influence_kit.gradients.Gradients, as sides"),  # type: ignore[arg-type]
    (lambda: index([1.0]), r"`data` must be a tensor \[n, d\] of floats; got"),
    (
        lambda: index(torch.ones(3, 2), torch.ones(2, 3)),
        r"`query` has shape \[2, 3\]; expected \[m",
    ),
    (
        lambda: index(torch.ones(3, 2), torch.ones(1, 2), -1),
        "`k` must be an int of at least 0; got",
    ),
    (lambda: refuse_deep(nested(65), "x"), "`x` holds lists that are nested more than 64 deep"),
]


def nested(depth: int) -> list[Any]:
    return [nested(depth - 1)] if depth else [1]


@pytest.mark.parametrize(("call", "told"), REFUSED, ids=[told for _, told in REFUSED])
def test_what_does_not_fit_is_refused(call: Callable[[], Any], told: str) -> None:
    with pytest.raises(InvalidArgumentError, match=told):
        call()


def test_what_fits_is_taken() -> None:
    assert result({"bias": BIAS, "other": None}) == {"0.bias": BIAS}
    transposed = Factored(torch.ones(2, 1, 3), torch.ones(2, 1, 4), torch.Size([4, 3]), True)
    assert transposed.dense().tolist() == [[1.0] * 12] * 2
    for value in ([], nested(60), torch.ones(2), None):
        refuse_deep(value, "x")
