"""Metrics of a score model and of its samples."""

from qcsbm_fast.metrics.asymmetry import AsymmetryByLevel, asymmetry_by_level
from qcsbm_fast.metrics.features import (
    KernelDistance,
    classifier_score,
    extract,
    frechet_distance,
    kernel_distance,
)
from qcsbm_fast.metrics.precision_recall import (
    DensityCoverage,
    PrecisionRecall,
    density_coverage,
    precision_recall,
)
from qcsbm_fast.metrics.score_error import oracle_score, score_error
from qcsbm_fast.metrics.wasserstein import sliced_wasserstein2, wasserstein2

__all__ = [
    "AsymmetryByLevel",
    "DensityCoverage",
    "KernelDistance",
    "PrecisionRecall",
    "asymmetry_by_level",
    "classifier_score",
    "density_coverage",
    "extract",
    "frechet_distance",
    "kernel_distance",
    "oracle_score",
    "precision_recall",
    "score_error",
    "sliced_wasserstein2",
    "wasserstein2",
]
