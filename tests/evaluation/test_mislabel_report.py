"""The table of scores that look for wrong labels."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from influence_kit.errors import InvalidArgumentError
from influence_kit.evaluation import mislabel_report, precision_at, recall_at

RANDOM = np.random.default_rng(0)
IS_WRONG = RANDOM.random(50) < 0.2
SCORES = {
    "noise": RANDOM.normal(size=50),
    "truth": IS_WRONG + 0.1 * RANDOM.normal(size=50),
    "half": IS_WRONG + 2 * RANDOM.normal(size=50),
}


def test_rows_are_the_metrics_best_first():
    report = mislabel_report(SCORES, IS_WRONG, fractions=[0.1, 0.5])
    assert report.fractions == (0.1, 0.5)
    aucs = {name: roc_auc_score(IS_WRONG, scores) for name, scores in SCORES.items()}
    assert [row.name for row in report.rows] == sorted(aucs, key=lambda name: -aucs[name])
    for row in report.rows:
        scores = SCORES[row.name]
        assert row.auc == pytest.approx(aucs[row.name])
        assert row.recall == tuple(recall_at(scores, IS_WRONG, f) for f in (0.1, 0.5))
        assert row.precision == tuple(precision_at(scores, IS_WRONG, f) for f in (0.1, 0.5))
    assert report.rows[0].name == "truth"
    assert report.rows[0].precision[0] == 1.0


def test_it_is_printed_as_a_table():
    lines = repr(mislabel_report(SCORES, IS_WRONG)).splitlines()
    columns = ["recall at 0.05", "recall at 0.1", "recall at 0.2", "precision at 0.05"]
    assert lines[0].split("  ")[-6:-2] == columns
    assert lines[2].split()[:2] == ["truth", "1.0000"]
    assert len(lines) == 5


def test_no_scores_are_refused():
    with pytest.raises(
        InvalidArgumentError, match=r"`scores` is empty; pass a dict \{name: how sus"
    ):
        mislabel_report({}, IS_WRONG)
