"""How good an attribution is: retraining, and metrics of plain scores, whatever the method."""

from influence_kit.evaluation.at_checkpoints import checkpoint_logits, checkpoint_losses
from influence_kit.evaluation.baselines import (
    embedding_cosine,
    label_cosine,
    last_loss,
    log_odds,
    low_margin,
    mean_loss,
    neighbor_disagreement,
    same_label_cosine,
)
from influence_kit.evaluation.batched_sgd import BatchedSGD
from influence_kit.evaluation.correlation import RowCorrelation
from influence_kit.evaluation.cost import Cost
from influence_kit.evaluation.datamodel import half_subsets, linear_datamodeling_score
from influence_kit.evaluation.fact_tracing import FactTracing, fact_tracing
from influence_kit.evaluation.leave_one_out import (
    LeaveOneOutCorrelation,
    leave_one_out,
    loo_correlation,
)
from influence_kit.evaluation.lexical import bm25
from influence_kit.evaluation.method_comparison import Comparison, SubsetTruth, compare
from influence_kit.evaluation.mislabel import (
    detection_curve,
    mislabel_auc,
    precision_at,
    recall_at,
)
from influence_kit.evaluation.mislabel_report import MislabelReport, MislabelRow, mislabel_report
from influence_kit.evaluation.removal import (
    Brittleness,
    RemovalCurve,
    brittleness,
    removal_curve,
)
from influence_kit.evaluation.removal_quality import RemovalQuality, removal_quality
from influence_kit.evaluation.retraining import Retraining
from influence_kit.evaluation.ridge import RidgeLeaveOneOut, ridge_leave_one_out
from influence_kit.evaluation.row_mean import RowMean
from influence_kit.evaluation.sanity import (
    Detection,
    class_detection,
    mixed_datasets,
    model_randomization,
    shortcut_detection,
    subclass_detection,
)
from influence_kit.evaluation.tail_patch import tail_patch
from influence_kit.evaluation.top_examples import Outliers, outlier_share, top_k_cardinality
from influence_kit.evaluation.tuning import Tuned, tune_damping

__all__ = [
    "BatchedSGD",
    "Brittleness",
    "Comparison",
    "Cost",
    "Detection",
    "FactTracing",
    "LeaveOneOutCorrelation",
    "MislabelReport",
    "MislabelRow",
    "Outliers",
    "RemovalCurve",
    "RemovalQuality",
    "Retraining",
    "RidgeLeaveOneOut",
    "RowCorrelation",
    "RowMean",
    "SubsetTruth",
    "Tuned",
    "bm25",
    "brittleness",
    "checkpoint_logits",
    "checkpoint_losses",
    "class_detection",
    "compare",
    "detection_curve",
    "embedding_cosine",
    "fact_tracing",
    "half_subsets",
    "label_cosine",
    "last_loss",
    "leave_one_out",
    "linear_datamodeling_score",
    "log_odds",
    "loo_correlation",
    "low_margin",
    "mean_loss",
    "mislabel_auc",
    "mislabel_report",
    "mixed_datasets",
    "model_randomization",
    "neighbor_disagreement",
    "outlier_share",
    "precision_at",
    "recall_at",
    "removal_curve",
    "removal_quality",
    "ridge_leave_one_out",
    "same_label_cosine",
    "shortcut_detection",
    "subclass_detection",
    "tail_patch",
    "top_k_cardinality",
    "tune_damping",
]
