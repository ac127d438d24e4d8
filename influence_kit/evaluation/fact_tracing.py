"""How soon scores find a training example that states the fact: Chang et al. 2024, 2410.17413.

Shapes: m test examples (facts), n training examples.
"""

from dataclasses import dataclass

import torch

from influence_kit.core.arguments import check_count
from influence_kit.core.tables import text_table
from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation.arrays import Values, marks, numbers
from influence_kit.evaluation.row_mean import RowMean


@dataclass(frozen=True, eq=False, repr=False)
class FactTracing:
    """The result of ``fact_tracing``.

    Attributes:
        k: how many examples with the highest scores count for the recall.
        reciprocal_rank: 1 / the rank of the first relevant example, of each test example; the mean
            is the MRR.
        recall: whether a relevant example is among the top k, of each test example; the mean is
            recall at k.
    """

    k: int
    reciprocal_rank: RowMean
    recall: RowMean

    def __repr__(self) -> str:
        rows = [
            ["reciprocal rank", *self.reciprocal_rank.cells()],
            [f"recall at {self.k}", *self.recall.cells()],
        ]
        return text_table(["", "mean", "std. error"], rows)


def fact_tracing(scores: Values, relevant: Values, k: int = 10) -> FactTracing:
    r"""Mean reciprocal rank and recall at k of the training examples that state each fact.

    .. math::
        \frac{1}{m} \sum_t \frac{1}{\min_{i : r_{ti}} \mathrm{rank}_t(i)}, \qquad
        \frac{1}{m} \sum_t [\min_{i : r_{ti}} \mathrm{rank}_t(i) \le k]

    The rank counts from 1 by descending score, ties by index. Which passages *state* a fact need
    not be those that *taught* it: in arXiv 2410.17413, ``bm25`` finds more of the former, and
    gradients move the model more (``tail_patch``).

    Args:
        scores: ``[m, n]``, positive is a proponent.
        relevant: which training examples state the fact of each test example, bool ``[m, n]``, at
            least one for each.
        k: how many examples with the highest scores count for the recall.

    Raises:
        InvalidArgumentError: for shapes that differ, a test example without a relevant training
            example, or a ``k`` outside 1 to n.

    Example:
        >>> fact_tracing([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]], [[0, 1, 1], [0, 0, 1]], k=1)
                          mean  std. error
        ---------------  -----  ----------
        reciprocal rank  0.750       0.250
        recall at 1      0.500       0.500
    """
    tau = numbers(scores, "scores", "[m, n]")
    is_relevant = marks(relevant, "relevant", "[m, n]", "True where an example states the fact")
    if is_relevant.shape != tau.shape:
        raise InvalidArgumentError(
            f"`scores` has shape {list(tau.shape)} and `relevant` {list(is_relevant.shape)}; both "
            "must be [m, n]"
        )
    check_count(k, "k", most=tau.shape[1])
    without = torch.nonzero(~is_relevant.any(dim=1)).flatten()
    if len(without):
        raise InvalidArgumentError(
            f"{len(without)} of {len(tau)} test examples have no relevant training example (the "
            f"first is test example {int(without[0])}); leave them out of both arguments"
        )
    order = tau.argsort(dim=1, descending=True, stable=True)
    # of equal values, `max` returns the first
    rank = is_relevant.gather(1, order).int().argmax(dim=1) + 1
    return FactTracing(k, RowMean(1 / rank.double()), RowMean((rank <= k).double()))
