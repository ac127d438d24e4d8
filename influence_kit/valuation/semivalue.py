"""Values of training examples for test examples: what an example adds to subsets of the others.

All are semivalues: ``v(i) = sum over sizes k of q(k) * mean over S of (u(S + i) - u(S))``, S the
subsets of k training examples without i, q(k) weights that sum to 1, and u(S) the utility: the
score of the model fitted on S.

Shapes: m test examples, n training examples, s subsets.
"""

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np
import torch
from captum.influence import DataInfluence
from torch import Tensor
from tqdm.auto import tqdm

from influence_kit.core.arguments import check_flag
from influence_kit.errors import InvalidArgumentError
from influence_kit.methods.restarts import check_k
from influence_kit.scoring.reducers import KMostInfluentialResults, TopK
from influence_kit.valuation.refits import Marks, Valuation, Values, as_scores


@dataclass(frozen=True, eq=False, repr=False)
class Semivalue(Valuation, DataInfluence):
    """v(i) = sum over k of q(k) * mean over S of size k, without i, of u(S + i) - u(S).

    u(S) is ``score(fit(S), inputs)``, separately for each test example. Rows are test examples;
    positive marks a proponent: models improve when it is added. The unit is that of the score.

    Args:
        empty_utility: u of the empty set, on which nothing is fitted: one number, or one per test
            example ``[m]``. For example 1 / classes, the accuracy of a random guess.

    The other arguments are those of ``Valuation``.
    """

    empty_utility: Any = field(default=0.0, kw_only=True)

    @abstractmethod
    def values(
        self, inputs: Any = None, aggregate: bool = False, show_progress: bool = False
    ) -> Values:
        """The values with their standard errors.

        Args:
            inputs: the second argument of ``score``, passed on unchanged.
            aggregate: one row of values, for the sum of the test examples' scores.
            show_progress: a progress bar over the fitted models.

        Raises:
            NonFiniteError: if a score is NaN or infinite.
        """

    @overload
    def influence(
        self,
        inputs: Any = None,
        k: None = None,
        proponents: bool = True,
        show_progress: bool = False,
        aggregate: bool = False,
    ) -> Tensor: ...

    @overload
    def influence(
        self,
        inputs: Any,
        k: int,
        proponents: bool = True,
        show_progress: bool = False,
        aggregate: bool = False,
    ) -> KMostInfluentialResults: ...

    def influence(
        self,
        inputs: Any = None,
        k: int | None = None,
        proponents: bool = True,
        show_progress: bool = False,
        aggregate: bool = False,
    ) -> Tensor | KMostInfluentialResults:
        """The values of all training examples for each test example, or the k best.

        Args:
            inputs: what ``score`` takes as its second argument; it is handed on as it is.
            k: how many proponents or opponents to return; None for all values.
            proponents: the highest values; False for the lowest.
            show_progress: a bar over the models that are fitted.
            aggregate: the values for the sum of the test examples' scores: one row.

        Returns:
            Values ``[m, n]`` (``[1, n]`` if ``aggregate``) in the order of the training set, or
            ``KMostInfluentialResults`` of ``[m, min(k, n)]``. Positive: a proponent, the score is
            higher with it.
        """
        check_k(k)
        check_flag(proponents, "proponents")
        values = self.values(inputs, aggregate, show_progress).values
        if k is None:
            return values
        reducer = TopK(k, proponents)
        reducer.update(torch.arange(self.train_count), values)
        return reducer.local_result()

    def self_influence(self, inputs: Any, show_progress: bool = False) -> Tensor:
        """The value ``[n]`` of each training example for itself: how far it is memorized.

        Args:
            inputs: all training examples in their order, as ``score`` takes them.
            show_progress: a progress bar over the fitted models.
        """
        values = self.values(inputs, show_progress=show_progress).values
        if len(values) != self.train_count:
            raise InvalidArgumentError(
                f"`self_influence` takes the {self.train_count} training examples as `inputs`, and "
                f"a score for each; there are {len(values)} scores"
            )
        return values.diagonal().clone()  # does not keep the other values in memory

    def _utilities(
        self, held: Marks, inputs: Any, bar: "tqdm[Any]", m: int | None = None
    ) -> Tensor:
        """The utilities ``[s, m]`` of the subsets in the rows of ``held [s, n]``.

        ``m`` is that of earlier subsets, if there were any.
        """
        # equal subsets are fitted once
        number: dict[bytes, int] = {}
        rows = [number.setdefault(row.tobytes(), len(number)) for row in held]
        distinct = np.frombuffer(b"".join(number), dtype=bool).reshape(len(number), -1)
        filled = distinct.any(axis=1)
        jobs = [(np.flatnonzero(row), inputs) for row in distinct[filled]]
        found = list(self._scores(jobs, bar))
        widths = sorted({len(scores) for scores in found} | ({m} if m else set()))
        if len(widths) > 1:
            raise InvalidArgumentError(
                "`score` must give the same number of values for each model; it gave "
                f"{widths[0]} for one and {widths[-1]} for another"
            )
        utilities = self._empty(widths[0]).repeat(len(distinct), 1)
        utilities[torch.from_numpy(filled)] = torch.stack(found)
        return utilities[rows]

    def _empty(self, m: int) -> Tensor:
        given = as_scores(self.empty_utility, "`empty_utility`")
        if len(given) not in (1, m):
            raise InvalidArgumentError(
                f"`empty_utility` holds {len(given)} numbers; `score` gives {m} per model"
            )
        return given.expand(m)
