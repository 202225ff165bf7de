"""Quasi-conservative score-based models without double backward: training, sampling and evaluation, fast."""

from . import ops
from .dual import Dual, DualUnsupported
from .objectives import DenoisingObjective
from .penalty import Asymmetry, asymmetry
from .random import NoiseStream
from .score import Score

__all__ = [
    "Asymmetry",
    "DenoisingObjective",
    "Dual",
    "DualUnsupported",
    "NoiseStream",
    "Score",
    "asymmetry",
    "ops",
]
