"""Metrics of a score model and of its samples."""

from qcsbm_fast.metrics.asymmetry import AsymmetryByLevel, asymmetry_by_level
from qcsbm_fast.metrics.precision_recall import PrecisionRecall, precision_recall
from qcsbm_fast.metrics.score_error import oracle_score, score_error

__all__ = [
    "AsymmetryByLevel",
    "PrecisionRecall",
    "asymmetry_by_level",
    "oracle_score",
    "precision_recall",
    "score_error",
]
