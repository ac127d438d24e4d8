"""Checks of the results of ``influence(..., k=k)`` that figures and reports take.

Shapes: m test examples, n training examples, k of them per test example.
"""

from typing import Any

from torch import Tensor

from influence_kit.core.arguments import check_text, shown
from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation.arrays import as_tensor, indices_in, numbers
from influence_kit.scoring.reducers import KMostInfluentialResults


def checked_results(results: Any, name: str, n: int) -> KMostInfluentialResults:
    """The results on the CPU, checked: indices in the training set, finite scores, ``[m, k]``.

    Args:
        results: what ``influence(..., k=k)`` returned, or a pair like it.
        name: the argument's name, for errors.
        n: how many training examples there are.

    Raises:
        InvalidArgumentError: for anything else.
    """
    if not isinstance(results, tuple) or len(results) != 2:
        raise InvalidArgumentError(
            f"`{name}` must be what `influence(..., k=k)` returned, (indices, influence_scores); "
            f"got {shown(results)}"
        )
    indices = as_tensor(results[0], f"{name}.indices", "integers [m, k]")
    scores = as_tensor(results[1], f"{name}.influence_scores", "numbers [m, k]")
    if indices.shape != scores.shape or indices.dim() != 2:
        raise InvalidArgumentError(
            f"`{name}` has indices of shape {list(indices.shape)} and influence_scores of "
            f"{list(scores.shape)}; both must be [m, k]"
        )
    if scores.numel() == 0:
        return KMostInfluentialResults(indices, scores)
    scores = numbers(scores, f"{name}.influence_scores", "[m, k]")
    found: Tensor = indices_in(indices.flatten(), n, f"{name}.indices").view(scores.shape)
    return KMostInfluentialResults(found, scores)


def checked_heads(heads: Any) -> tuple[str, str] | None:
    """The heads of the columns of proponents and opponents: two texts, or None.

    Raises:
        InvalidArgumentError: for anything else.
    """
    if heads is None:
        return None
    if not isinstance(heads, tuple | list) or len(heads) != 2:
        raise InvalidArgumentError(
            f"`heads` must be two texts, for proponents and for opponents; got {shown(heads)}"
        )
    return check_text(heads[0], "heads[0]"), check_text(heads[1], "heads[1]")
