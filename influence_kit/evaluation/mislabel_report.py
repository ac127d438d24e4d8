"""Several scores that look for wrong labels, compared in a table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from influence_kit.core.arguments import check_mapping, check_sequence
from influence_kit.core.tables import text_table
from influence_kit.evaluation.arrays import Values
from influence_kit.evaluation.mislabel import mislabel_auc, precision_at, recall_at


class MislabelRow(NamedTuple):
    """How well one score finds the wrong labels.

    Attributes:
        name: of the score.
        auc: ``mislabel_auc``.
        recall: ``recall_at`` each of the report's fractions.
        precision: ``precision_at`` each of them.
    """

    name: str
    auc: float
    recall: tuple[float, ...]
    precision: tuple[float, ...]


@dataclass(frozen=True, repr=False)
class MislabelReport:
    """One row per score, the highest area under the curve first; printed as a table.

    Attributes:
        fractions: the shares of the examples that are inspected.
        rows: by descending AUC; ties in the given order.
    """

    fractions: tuple[float, ...]
    rows: tuple[MislabelRow, ...]

    def __repr__(self) -> str:
        shares = [f"{fraction:.3g}" for fraction in self.fractions]
        header = [
            "score",
            "AUC",
            *(f"{kind} at {s}" for kind in ("recall", "precision") for s in shares),
        ]
        lines = [
            [row.name, f"{row.auc:.4f}", *(f"{value:.1%}" for value in row.recall + row.precision)]
            for row in self.rows
        ]
        return text_table(header, lines)


def mislabel_report(
    scores: Mapping[str, Values], is_wrong: Values, fractions: Sequence[float] = (0.05, 0.1, 0.2)
) -> MislabelReport:
    """How well each score finds the wrong labels.

    Compare a method's ``self_influence`` with baselines: ``mean_loss``, ``last_loss``,
    ``low_margin``, ``neighbor_disagreement``, ``same_label_cosine``.

    Args:
        scores: ``{name: how suspicious each example is}``, ``[n]`` each.
        is_wrong: whether each label is wrong, ``[n]``.
        fractions: the shares of the examples inspected.

    Raises:
        InvalidArgumentError: for no scores; otherwise as ``mislabel_auc`` and ``precision_at``.

    Example:
        >>> is_wrong = [True, False, False, True]
        >>> scores = {"loss": [0.9, 0.1, 0.5, 0.4], "margin": [0.9, 0.1, 0.2, 0.8]}
        >>> print(mislabel_report(scores, is_wrong, fractions=[0.5]))
        score      AUC  recall at 0.5  precision at 0.5
        ------  ------  -------------  ----------------
        margin  1.0000         100.0%            100.0%
        loss    0.7500          50.0%             50.0%
    """
    named = check_mapping(scores, "scores", "{name: how suspicious each example is}")
    fractions = check_sequence(fractions, "fractions", "shares of the examples inspected")
    rows = [
        MislabelRow(
            name,
            mislabel_auc(values, is_wrong),
            tuple(recall_at(values, is_wrong, fraction) for fraction in fractions),
            tuple(precision_at(values, is_wrong, fraction) for fraction in fractions),
        )
        for name, values in named.items()
    ]
    return MislabelReport(tuple(fractions), tuple(sorted(rows, key=lambda row: -row.auc)))
