"""Wasserstein-2 distances between sets of samples, by Python Optimal Transport (the extra `metrics`)."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

_MOST = 5000  # points of the exact distance: 200 MB of costs, a minute


def wasserstein2(a: Tensor, b: Tensor) -> float:
    """The distance of order 2 between the sets `a (N, *)` and `b (M, *)`, exact, from an N x M matrix of costs.

    That of two finite draws of one law is not 0: compare with the distance of two sets of data.

    Raises:
        ImportError: without POT.
        ValueError: for more than 5000 samples, or samples of different shapes.
    """
    if a.shape[1:] != b.shape[1:] or max(len(a), len(b)) > _MOST:
        raise ValueError(
            f"a, b: expected samples of one shape, at most {_MOST} each, got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    ot = _pot()
    costs = ot.dist(a.double().flatten(1).cpu().numpy(), b.double().flatten(1).cpu().numpy())
    return math.sqrt(max(ot.emd2([], [], costs, numItermax=10_000_000), 0.0))


def sliced_wasserstein2(a: Tensor, b: Tensor, *, projections: int = 200, seed: int = 0) -> float:
    """The root mean square of the distances of order 2 between the sets' projections onto random directions.

    Takes `a (N, *)` and `b (M, *)` of any size; the directions come from `seed` (Bonneel et al. 2015).

    Raises ImportError without POT.
    """
    ot = _pot()
    arrays = (v.double().flatten(1).cpu().numpy() for v in (a, b))
    return float(ot.sliced_wasserstein_distance(*arrays, n_projections=projections, seed=seed))


def _pot() -> Any:
    try:
        import ot
    except ImportError as error:
        raise ImportError("Wasserstein distances need POT: pip install 'qcsbm-fast[metrics]'") from error
    return ot
