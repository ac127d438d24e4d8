"""A value for each test example, and their mean with its standard error."""

from dataclasses import dataclass

from torch import Tensor

from influence_kit.evaluation.arrays import standard_error


@dataclass(frozen=True, eq=False, repr=False)
class RowMean:
    """A value for each test example, and their mean.

    Attributes:
        per_test: float64 ``[m]``.
    """

    per_test: Tensor

    @property
    def mean(self) -> float:
        """The mean over test examples."""
        return float(self.per_test.mean())

    @property
    def standard_error(self) -> float | None:
        """The standard error of the mean over test examples; None for a single one."""
        error = standard_error(self.per_test)
        return None if error is None else float(error)

    def cells(self) -> list[str]:
        """The mean and its standard error, as text."""
        error = self.standard_error
        return [f"{self.mean:.3f}", "-" if error is None else f"{error:.3f}"]

    def __repr__(self) -> str:
        error = "" if self.standard_error is None else f" +- {self.standard_error:.3f}"
        return f"{self.mean:.3f}{error} over {len(self.per_test)} test examples"
