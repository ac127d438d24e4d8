"""Values from permutations of the training set: Shapley and Beta-Shapley values.

Shapes: m test examples, n training examples, P permutations; k examples precede another in one.
"""

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence_kit.core.arguments import check_count, check_flag, check_number
from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation.arrays import as_tensor
from influence_kit.valuation.refits import MOST, Indices, Moments, Values
from influence_kit.valuation.semivalue import Semivalue


@dataclass(frozen=True, eq=False, repr=False)
class PermutationValue(Semivalue):
    """v(i) = mean over permutations of n q(k) (u(S + i) - u(S)), S the k examples before i.

    Args:
        permutations: how many to draw, or the permutations themselves, int ``[P, n]``. Up to n
            models are fitted per permutation. Drawing more only appends to those drawn before.
        tolerance: a permutation is truncated as soon as u(S) is closer than this to u of the whole
            training set for every test example; the remaining examples count as adding nothing. The
            sum of the Shapley values of a test example is then off by less than the tolerance. 0
            truncates none.
    """

    permutations: int | np.ndarray = 100
    tolerance: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self.tolerance, "tolerance", least=0)
        self._orders()  # refuses a wrong one at once

    @abstractmethod
    def _size_weights(self) -> Tensor:
        """q(k) for k = 0 ... n - 1, ``[n]``."""

    def values(
        self, inputs: Any = None, aggregate: bool = False, show_progress: bool = False
    ) -> Values:
        """The values with their standard errors; all permutations grow by one example at a time."""
        check_flag(aggregate, "aggregate")
        orders = self._orders()
        count, n = orders.shape
        scale = n * self._size_weights()
        with self._bar(1 + count * (n - 1), show_progress) as bar:
            full = self._utilities(np.ones((1, n), dtype=bool), inputs, bar)
            m = full.shape[1]
            before = self._empty(m).repeat(count, 1)
            moments = Moments(n, 1 if aggregate else m)
            held = np.zeros((count, n), dtype=bool)
            for size in range(n):
                added = orders[:, size]
                held[np.arange(count), added] = True
                going = ((full - before).abs() >= self.tolerance).any(dim=1)
                after = before.clone()
                if size == n - 1:
                    after[going] = full
                elif going.any():
                    after[going] = self._utilities(held[going.numpy()], inputs, bar, m)
                gains = scale[size] * (after - before)
                gains = gains.sum(dim=1, keepdim=True) if aggregate else gains
                moments.add(torch.from_numpy(added), gains)
                before = after
        return moments.result()

    def _orders(self) -> Indices:
        """The permutations ``[P, n]``."""
        n = self.train_count
        if isinstance(self.permutations, int):
            check_count(self.permutations, "permutations", most=MOST)
            random = np.random.default_rng(self.seed)
            return np.stack([random.permutation(n) for _ in range(self.permutations)])
        given = as_tensor(self.permutations, "permutations", f"an int or an array [P, {n}]").numpy()
        if given.ndim != 2 or not len(given) or given.shape[1] != n:
            raise InvalidArgumentError(
                f"`permutations` must be an int or an array [P, {n}]; got shape {list(given.shape)}"
            )
        wrong = np.flatnonzero((np.sort(given, axis=1) != np.arange(n)).any(axis=1))
        if len(wrong):
            raise InvalidArgumentError(
                f"row {wrong[0]} of `permutations` does not contain each of 0 to {n - 1} once"
            )
        return given.astype(np.int64)


@dataclass(frozen=True, eq=False, repr=False)
class TMCShapley(PermutationValue):
    r"""v(i) = mean over permutations of u(S + i) - u(S), S the examples before i.

    .. math::
        v(i) = \frac{1}{n} \sum_{S \not\ni i} \binom{n-1}{|S|}^{-1} \bigl(u(S + i) - u(S)\bigr)

    The Shapley value by truncated Monte Carlo (arXiv 1904.02868). In each permutation, and so in
    the mean, the values of a test example sum to u(all) - u(none), exactly if ``tolerance`` is 0.
    Rows are test examples; positive marks a proponent.

    The other arguments are those of ``Valuation``, ``Semivalue`` and ``PermutationValue``.

    Example:
        >>> worth = np.array([3.0, -1.0, 2.0])
        >>> shapley = TMCShapley(lambda indices: worth[indices].sum(), lambda model, _: model, 3)
        >>> shapley.influence()
        tensor([[ 3., -1.,  2.]], dtype=torch.float64)
        >>> shapley.influence(k=1, proponents=False).indices
        tensor([[1]])
    """

    def _size_weights(self) -> Tensor:
        return torch.full((self.train_count,), 1 / self.train_count, dtype=torch.float64)


@dataclass(frozen=True, eq=False, repr=False)
class BetaShapley(PermutationValue):
    r"""v(i) = mean over permutations of n q(k) (u(S + i) - u(S)), S the k examples before i.

    .. math::
        q(k) = \binom{n-1}{k} \frac{B(k + \beta, \; n - 1 - k + \alpha)}{B(\alpha, \beta)}

    Beta(alpha, beta)-Shapley (arXiv 2110.14049), where B is the beta function. Alpha above beta
    weights small subsets more, in which one example adds most relative to the noise; (1, 1) is the
    Shapley value. The weights do not change which models are fitted, only how much each counts: the
    more uneven they are, the larger the standard errors. The values do not sum to u(all) - u(none).
    Rows are test examples; positive marks a proponent.

    Args:
        alpha, beta: positive numbers; the paper finds wrong labels with (16, 1) and (4, 1).

    The other arguments are those of ``Valuation``, ``Semivalue`` and ``PermutationValue``.

    Example:
        >>> fit, score = lambda indices: len(indices) ** 0.5, lambda model, inputs: model
        >>> small_sets_count = BetaShapley(fit, score, 4, alpha=16, beta=1)
        >>> bool(small_sets_count.influence().mean() > TMCShapley(fit, score, 4).influence().mean())
        True
    """

    alpha: float = field(kw_only=True)
    beta: float = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self.alpha, "alpha", above=0)
        check_number(self.beta, "beta", above=0)

    def _size_weights(self) -> Tensor:
        k = torch.arange(self.train_count - 1, dtype=torch.float64)
        rest = self.train_count - 1 - k
        # q(k + 1) / q(k), in which the large factorials cancel
        ratios = rest / (k + 1) * (k + self.beta) / (rest - 1 + self.alpha)
        return torch.cat([k.new_zeros(1), ratios.log().cumsum(0)]).softmax(0)
