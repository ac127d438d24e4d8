"""Metrics of which training examples are in the top k, over many test examples.

Shapes: m test examples, n training examples, k the number of top training examples.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from influence_kit.core.arguments import check_count
from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation.arrays import Values, as_tensor, numbers


class TopExamples(Protocol):
    """What ``influence(inputs, k=...)`` returns: ``indices`` ``[m, K]``, best first."""

    @property
    def indices(self) -> Tensor:
        """Indices of training examples."""


class Top(NamedTuple):
    """The k training examples with the highest scores of each test example.

    Attributes:
        indices: int64 ``[m, k]``, best first, ties by index.
        n: the number of training examples; None if only the best are known.
    """

    indices: Tensor
    n: int | None

    def count_of(self, labels: Any, name: str) -> int:
        """The number of training examples: that of the scores, else that of their labels."""
        if self.n is not None:
            return self.n
        count, most = len(as_tensor(labels, name, "one per example").flatten()), self.highest
        if most >= count:
            raise InvalidArgumentError(
                f"the top examples have indices up to {most}, and `{name}` has {count} items; "
                "pass one for each training example"
            )
        return count

    @property
    def highest(self) -> int:
        """The largest index."""
        return int(self.indices.max())


def top_examples(scores: Values | TopExamples, k: Any) -> Top:
    """The top k of scores ``[m, n]``, or the first k of a result that holds only the best.

    Raises:
        InvalidArgumentError: for other shapes, or a ``k`` that is not within 1 to n (or to the
            number of examples that the result holds).
    """
    check_count(k, "k")
    given = getattr(scores, "indices", None)
    n: int | None = None
    if isinstance(given, Tensor) and not isinstance(scores, Tensor):
        ordered = _indices(given)
    else:
        tau = numbers(cast("Values", scores), "scores", "[m, n]")
        ordered, n = tau.argsort(dim=1, descending=True, stable=True), tau.shape[1]
    if k > ordered.shape[1]:
        raise InvalidArgumentError(
            f"`k` is {k}; there are {ordered.shape[1]} training examples for each test example"
        )
    return Top(ordered[:, :k], n)


def _indices(given: Tensor) -> Tensor:
    found = as_tensor(given, "scores.indices", "integers [m, k]")
    whole = not (found.is_floating_point() or found.dtype == torch.bool)
    if found.dim() != 2 or found.numel() == 0 or not whole or int(found.min()) < 0:
        raise InvalidArgumentError(
            f"`scores.indices` has shape {list(found.shape)} and {found.dtype}; expected indices "
            "[m, k] of training examples, none of them negative"
        )
    return found.long()


@dataclass(frozen=True, eq=False, repr=False)
class Outliers:
    """How much the same few examples lead every list: the result of ``outlier_share``.

    Attributes:
        share: the share of the m * k entries of all lists that the k most frequent examples have.
        indices: these examples, int64 ``[k]``, the most frequent first.
        frequency: the share of the test examples that have each in their top k, ``[k]``.
    """

    share: float
    indices: Tensor
    frequency: Tensor

    def __repr__(self) -> str:
        first, often = int(self.indices[0]), float(self.frequency[0])
        return (
            f"{self.share:.3f} (k = {len(self.indices)}); example {first} is in {often:.1%} of the "
            "lists"
        )


def top_k_cardinality(scores: Values | TopExamples, k: int = 10) -> float:
    r"""The number of distinct examples in the top k of all test examples, over m * k.

    .. math::
        \frac{1}{m k} \Bigl| \bigcup_t \mathrm{top}_k(\tau_t) \Bigr|

    From 1 / m (all test examples have the same top k: full overlap) to min(1, n / (m k)) (no
    overlap beyond what the size of the training set forces). Explanations should depend on what is
    explained, so higher is better (arXiv 2003.11630); ``outlier_share`` identifies the examples
    that repeat.

    Args:
        scores: ``[m, n]``, positive is a proponent; or what ``influence(inputs, k=...)`` returns.
        k: how many examples with the highest scores count, ties by index.

    Raises:
        InvalidArgumentError: for other shapes, or a ``k`` outside 1 to n.

    Example:
        >>> top_k_cardinality([[3.0, 2.0, -1.0], [0.5, -2.0, 4.0]], k=2)
        0.75
    """
    indices = top_examples(scores, k).indices
    return len(indices.unique()) / indices.numel()


def outlier_share(scores: Values | TopExamples, k: int = 10) -> Outliers:
    r"""How much the same few training examples lead the lists of all test examples.

    .. math::
        \frac{1}{m k} \sum_{i \in F} \bigl| \{ t : i \in \mathrm{top}_k(\tau_t) \} \bigr|

    F are the k training examples that are in most of the lists. 1: every test example has the same
    top k. Where test examples fall into c classes of equal size with lists of their own, about
    1 / c; random scores reach little more than k / n for many test examples.

    A value well above that has a usual cause: training examples with large gradients (outliers,
    wrong labels), whose inner product with everything is large. Methods that take the norm of the
    training gradient out of the score help: RelatIF (``relative="theta"`` or ``"l"``) and
    ``GradCos``.

    Args:
        scores: ``[m, n]``, positive is a proponent; or what ``influence(inputs, k=...)`` returns.
        k: how many examples with the highest scores count, ties by index.

    Raises:
        InvalidArgumentError: for other shapes, or a ``k`` outside 1 to n.

    Example:
        >>> outlier_share([[3.0, 2.0, -1.0], [9.0, -2.0, 4.0]], k=1)
        1.000 (k = 1); example 0 is in 100.0% of the lists
    """
    indices = top_examples(scores, k).indices
    examples, counts = indices.flatten().unique(return_counts=True)
    order = counts.argsort(descending=True, stable=True)[:k]
    frequency = counts[order].double() / len(indices)
    return Outliers(float(frequency.sum()) / k, examples[order], frequency)
