"""Data Banzhaf: Wang and Jia 2022, arXiv 2205.15466.

Shapes: m test examples, n training examples, s subsets.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from influence_kit.core.arguments import check_count, check_flag
from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation.arrays import as_tensor
from influence_kit.valuation.refits import MOST, Marks, Values, standard_errors
from influence_kit.valuation.semivalue import Semivalue


@dataclass(frozen=True, eq=False, repr=False)
class DataBanzhaf(Semivalue):
    r"""v(i) = mean of u(S) over drawn subsets with i - mean of u(S) over those without.

    .. math::
        v(i) = \frac{1}{2^{n-1}} \sum_{S \not\ni i} \bigl(u(S + i) - u(S)\bigr)

    The Banzhaf value by maximum sample reuse (arXiv 2205.15466): each subset contains each example
    with probability 1/2, and every model contributes to every value, so that few models are needed.
    Of all semivalues, its ranking is the most robust to a noisy utility. The values do not sum to
    u(all) - u(none). Rows are test examples; positive marks a proponent. ``counts`` are the numbers
    of subsets that contain each example.

    Args:
        subsets: how many to draw, or the subsets themselves, bool ``[s, n]``. One model is fitted
            per subset. Drawing more only appends to those drawn before.

    The other arguments are those of ``Valuation`` and ``Semivalue``.

    Example:
        >>> subsets = np.array(list(np.ndindex(2, 2, 2, 2)), dtype=bool)  # all there are
        >>> DataBanzhaf(lambda s: float(s.sum()), lambda model, _: model, 4, subsets).influence()
        tensor([[0., 1., 2., 3.]], dtype=torch.float64)
    """

    subsets: int | np.ndarray = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        held = self._held()  # refuses wrong ones at once
        counts = held.sum(axis=0)
        missing = np.flatnonzero((counts == 0) | (counts == len(held)))
        if len(missing):
            raise InvalidArgumentError(
                f"{len(missing)} of {self.train_count} training examples (the first: "
                f"{missing[0]}) are in none or in all of the {len(held)} subsets; subsets with and "
                "without each example are needed: use more `subsets`"
            )

    def values(
        self, inputs: Any = None, aggregate: bool = False, show_progress: bool = False
    ) -> Values:
        """The values with their standard errors."""
        check_flag(aggregate, "aggregate")
        subsets = self._held()
        with self._bar(len(subsets), show_progress) as bar:
            utilities = self._utilities(subsets, inputs, bar)
        if aggregate:
            utilities = utilities.sum(dim=1, keepdim=True)
        centre = utilities.mean(dim=0)
        sides = []
        for held in (subsets, ~subsets):
            marks = torch.from_numpy(held).double()
            counts = marks.sum(dim=0)
            # relative to the common mean, so that no large numbers cancel
            means = (utilities - centre).T @ marks / counts
            squares = (utilities - centre).square().T @ marks - counts * means.square()
            sides.append((means, standard_errors(squares.clamp(min=0), counts), counts))
        (with_it, error, counts), (without, other_error, _) = sides
        return Values(with_it - without, torch.hypot(error, other_error), counts.long())

    def _held(self) -> Marks:
        """The subsets ``[s, n]``."""
        n = self.train_count
        if isinstance(self.subsets, int):
            check_count(self.subsets, "subsets", most=MOST)
            return np.random.default_rng(self.seed).random((self.subsets, n)) < 0.5
        expected = f"an int or a bool array [s, {n}]"
        given: Marks = as_tensor(self.subsets, "subsets", expected).numpy()
        if given.ndim != 2 or given.dtype != bool or not len(given) or given.shape[1] != n:
            raise InvalidArgumentError(
                f"`subsets` must be {expected}; got {given.dtype} of shape {list(given.shape)}"
            )
        return given
