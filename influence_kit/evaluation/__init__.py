"""How good an attribution is: functions of plain scores, which know no method."""

from influence_kit.evaluation.mislabel import detection_curve, mislabel_auc, recall_at

__all__ = ["detection_curve", "mislabel_auc", "recall_at"]
