"""Selection of training examples: by the best of several groups, and in two stages.

Shapes: m test examples, n training examples, G groups, K candidates, k requested examples.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from influence_kit.core.arguments import check_count, check_flag, check_function, shown
from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation.arrays import Values, class_labels, numbers
from influence_kit.scoring.reducers import KMostInfluentialResults


class Scores(Protocol):
    """A method of this package, or anything that scores in the same way."""

    def influence(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """All scores ``[m, n]``, or with ``k`` the k best."""


MakeMethod = Callable[[list[int]], Scores]
CALL = "expensive(indices) -> method of these training examples"


def max_over_groups(scores: Values, groups: Values) -> Tensor:
    r"""The best over groups of test examples of the group's mean score, for each training example.

    .. math::
        \max_g \frac{1}{|g|} \sum_{t \in g} \tau_{ti}

    LESS (arXiv 2402.04333) selects training data in this way: an example counts if it helps one
    task of the validation set, while the mean over all of them favours examples that help each a
    little.

    Where ``[m, n]`` scores are too many, pass the means of the groups,
    ``method.influence(group, aggregate=True) / len(group)``, as rows with a group each.

    Args:
        scores: ``[m, n]``; positive is a proponent.
        groups: the group of each test example, integers ``[m]``.

    Returns:
        Scores of the training examples, float64 ``[n]``.

    Raises:
        InvalidArgumentError: for other shapes, groups that are not integers, or scores that are not
            finite.

    Example:
        >>> max_over_groups([[1.0, 0.0], [3.0, 0.0], [0.0, 1.5]], [7, 7, 8]).tolist()
        [2.0, 1.5]
    """
    tau = numbers(scores, "scores", "[m, n]")
    given = class_labels(groups, "groups", len(tau))
    _, group, sizes = torch.unique(given, return_inverse=True, return_counts=True)
    sums = torch.zeros(len(sizes), tau.shape[1], dtype=tau.dtype).index_add_(0, group, tau)
    means: Tensor = sums / sizes[:, None]
    return means.amax(dim=0)


def two_stage(
    cheap: Scores,
    expensive: MakeMethod,
    inputs: Any,
    k: int,
    candidates: int,
    proponents: bool = True,
) -> KMostInfluentialResults:
    """The k best by an expensive method among the candidates of a cheap one, per test example.

    The cheap method (``LoGra``, ``TRAK``, a stored ``GradDot``) names its K best training examples
    for each test example. The expensive one scores the union of these, and the k best of each test
    example's own candidates are returned: their scores are exact, and what the cheap method misses
    is lost. Recall rises with K; measure it on a few test examples against a full run.

    ``expensive`` makes a method of the training examples at ``indices``. A curvature must still be
    that of the whole training set: pass it as ``hessian_dataset``. Methods without that argument
    whose scores depend on all training examples (``TRAK``, ``KNNShapley``, ``MAGIC``) cannot be
    the expensive one.

    The cost of scoring is proportional to the union, at most m * K examples; memory is m times the
    union.

    Args:
        cheap: a method of the whole training set.
        expensive: ``expensive(indices) -> method``, with ``indices`` a list of ints, ascending:
            ``lambda indices: CGInfluenceFunction(model, Subset(train, indices), checkpoints,
            hessian_dataset=train, ...)``.
        inputs: the test examples, as both methods' ``influence`` takes them.
        k: how many examples to return for each test example, at most ``candidates``.
        candidates: K, how many candidates each test example has.
        proponents: the highest scores; False for the lowest, in both stages.

    Returns:
        ``KMostInfluentialResults`` of ``[m, min(k, n)]``, indices in the whole training set.

    Raises:
        InvalidArgumentError: for a ``k`` outside 1 to K, a cheap method that does not return the k
            best, or an expensive one that does not score exactly the examples asked for.

    Example:
        >>> from torch.utils.data import Subset, TensorDataset
        >>> from influence_kit import ExplicitInfluenceFunction, GradDot
        >>> _ = torch.manual_seed(0)
        >>> model, x, y = torch.nn.Linear(3, 2), torch.randn(20, 3), torch.arange(20) % 2
        >>> train, query = TensorDataset(x, y), (x[:4], y[:4])
        >>> common = {"checkpoints": [model.state_dict()], "loss_fn": torch.nn.CrossEntropyLoss()}
        >>> def exact(indices):
        ...     subset = Subset(train, indices)
        ...     return ExplicitInfluenceFunction(model, subset, hessian_dataset=train, **common)
        >>> cheap = GradDot(model, train, **common)
        >>> two_stage(cheap, exact, query, k=2, candidates=5).indices.shape
        torch.Size([4, 2])
    """
    check_count(candidates, "candidates")
    check_count(k, "k", most=candidates)
    check_flag(proponents, "proponents")
    check_function(expensive, "expensive", CALL)
    found = _candidates(cheap, inputs, candidates, proponents)
    union, columns = torch.unique(found, return_inverse=True)
    scores = _scores(expensive(union.tolist()), inputs, len(found), len(union))
    # in ascending order, so that of equal scores the first indices come first
    columns = columns.sort(dim=1).values
    own = scores.gather(1, columns.to(scores.device))
    order = own.argsort(dim=1, descending=proponents, stable=True)[:, :k]
    best = columns.to(scores.device).gather(1, order)
    return KMostInfluentialResults(union.to(scores.device)[best], own.gather(1, order))


def _candidates(cheap: Scores, inputs: Any, count: int, proponents: bool) -> Tensor:
    """The indices of each test example's candidates, ``[m, K]`` on the CPU."""
    if not callable(getattr(cheap, "influence", None)) or isinstance(cheap, type):
        raise InvalidArgumentError(
            "`cheap` must have `influence(inputs, k=...)`, as methods of this package; got "
            f"{shown(cheap)}"
        )
    found = cheap.influence(inputs, k=count, proponents=proponents)
    indices = getattr(found, "indices", None)
    if not isinstance(indices, Tensor) or indices.dim() != 2 or indices.is_floating_point():
        raise InvalidArgumentError(
            f"`cheap.influence(inputs, k={count})` returned {shown(found)}; it must return "
            "KMostInfluentialResults, with indices [m, K]"
        )
    return indices.cpu()


def _scores(method: Any, inputs: Any, m: int, count: int) -> Tensor:
    """The scores ``[m, count]`` of the expensive method."""
    if not callable(getattr(method, "influence", None)) or isinstance(method, type):
        raise InvalidArgumentError(
            f"`expensive` returned {shown(method)}; it must return a method with "
            "`influence(inputs)`"
        )
    scores = method.influence(inputs)
    if not isinstance(scores, Tensor) or scores.shape != (m, count):
        got = list(scores.shape) if isinstance(scores, Tensor) else shown(scores)
        raise InvalidArgumentError(
            f"the method that `expensive` returned has scores {got} for {count} training examples "
            f"and {m} test examples; it must be a method of the examples at `indices` alone, such "
            "as `Subset(train_dataset, indices)`"
        )
    return scores
