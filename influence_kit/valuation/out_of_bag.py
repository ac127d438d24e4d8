"""Data-OOB: Kwon and Zou 2023, arXiv 2304.07718."""

from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from influence_kit.core.arguments import check_count
from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation.arrays import as_tensor
from influence_kit.valuation.refits import MOST, Indices, Marks, Moments, Valuation, Values


@dataclass(frozen=True, eq=False, repr=False)
class DataOOB(Valuation):
    """v(i) = mean, over the models whose bag lacks example i, of their score on i.

    A bag is ``bag_size`` training examples drawn with replacement (arXiv 2304.07718). A few hundred
    models give all n values, and there is no test set: the value measures how well the other
    examples predict an example. So an example with a wrong label has a *low* value. The unit is
    that of the score.

    Args:
        score: how good a model is on training examples: ``score(model, indices)`` gives
            one number per index, higher is better: 1 where the model is right, or minus its loss.
        bags: how many to draw, or the bags, int ``[bags, bag_size]``. One model is fitted per bag,
            whose indices may repeat. Drawing more only appends to those drawn before.
        bag_size: examples per bag; n where None, which leaves out 37% of the examples.

    The other arguments are those of ``Valuation``.

    Raises:
        InvalidArgumentError: if an example is in every bag.

    Example:
        >>> labels = np.array([0.0, 0.0, 0.0, 1.0])
        >>> fit = lambda indices: labels[indices].mean().round()
        >>> right = lambda model, indices: labels[indices] == model
        >>> DataOOB(fit, right, 4, bags=50).self_influence().argmin()
        tensor(3)
    """

    bags: int | np.ndarray = 200
    bag_size: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        bags = self._drawn()  # refuses wrong ones at once
        missing = np.flatnonzero(~self._outside(bags).any(axis=0))
        if len(missing):
            raise InvalidArgumentError(
                f"{len(missing)} of {self.train_count} training examples (the first: "
                f"{missing[0]}) are in each of the {len(bags)} bags of {bags.shape[1]}, so that no "
                "model was fitted without them; use more `bags` or a smaller `bag_size`"
            )

    def values(self, show_progress: bool = False) -> Values:
        """The values with their standard errors, ``[1, n]``.

        Raises:
            NonFiniteError: if a score is NaN or infinite.
        """
        bags = self._drawn()
        outside = map(np.flatnonzero, self._outside(bags))
        jobs = [(bag, out) for bag, out in zip(bags, outside, strict=True) if len(out)]
        moments = Moments(self.train_count, 1)
        with self._bar(len(jobs), show_progress) as bar:
            for (_, out), scores in zip(jobs, self._scores(jobs, bar), strict=True):
                if len(scores) != len(out):
                    raise InvalidArgumentError(
                        "`score(model, indices)` must give one number per index; it gave "
                        f"{len(scores)} for {len(out)} indices"
                    )
                moments.add(torch.from_numpy(out), scores[:, None])
        return moments.result()

    def self_influence(self, show_progress: bool = False) -> Tensor:
        """The values ``[n]``; low for examples that the other examples predict badly."""
        return self.values(show_progress).values[0]

    def influence(self, inputs: Any = None, **kwargs: Any) -> NoReturn:
        """Data-OOB has no test examples.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "Data-OOB gives one value per training example, not one per test example: call "
            "`self_influence()`; `DataBanzhaf` and `TMCShapley` give values for test examples"
        )

    def _outside(self, bags: Indices) -> Marks:
        """Which training examples are not in each bag, bool ``[bags, n]``."""
        outside = np.ones((len(bags), self.train_count), dtype=bool)
        np.put_along_axis(outside, bags, False, axis=1)
        return outside

    def _drawn(self) -> Indices:
        """The bags ``[bags, bag_size]``, each ascending."""
        n = self.train_count
        if isinstance(self.bags, int):
            check_count(self.bags, "bags", most=MOST)
            size = n if self.bag_size is None else self.bag_size
            check_count(size, "bag_size", most=MOST)
            random = np.random.default_rng(self.seed)
            return np.sort(random.integers(n, size=(self.bags, size)), axis=1)
        if self.bag_size is not None:
            raise InvalidArgumentError(
                "`bag_size` is for bags that are drawn, and `bags` holds given ones: leave one of "
                "them out"
            )
        given = as_tensor(self.bags, "bags", "an int or an int array [bags, bag_size]").numpy()
        if given.ndim != 2 or not given.size or not np.issubdtype(given.dtype, np.integer):
            raise InvalidArgumentError(
                "`bags` must be an int or an int array [bags, bag_size]; got "
                f"{given.dtype} of shape {list(given.shape)}"
            )
        if given.min() < 0 or given.max() >= n:
            raise InvalidArgumentError(
                f"`bags` holds indices from {given.min()} to {given.max()}; expected 0 to {n - 1}"
            )
        return np.sort(given.astype(np.int64), axis=1)
