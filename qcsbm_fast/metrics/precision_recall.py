"""Precision and recall by nearest-neighbour manifolds (Kynkaanniemi et al. 2019, arXiv 1904.06991)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_BLOCK = 1024  # rows of the distance matrix held at once


class PrecisionRecall(NamedTuple):
    """Two fractions in [0, 1]."""

    precision: float
    recall: float


@torch.no_grad()
def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> PrecisionRecall:
    """How much of `fake (M, *)` lies on the manifold of `real (N, *)`, and the reverse.

    The manifold of a set is the union of the closed balls around its points, each reaching to the point's
    k-th nearest neighbour in the set, itself not counted. Precision is the fraction of `fake` on the manifold
    of `real`, recall the fraction of `real` on that of `fake`. Distances are Euclidean, in float64, without
    the expansion into products (which cancels). Memory is O(max(N, M)).

    Raises ValueError where k < 1, a set has k points or fewer, or the samples' shapes differ.
    """
    if real.shape[1:] != fake.shape[1:]:
        shapes = f"{tuple(real.shape[1:])} and {tuple(fake.shape[1:])}"
        raise ValueError(f"real, fake: expected samples of one shape, got {shapes}")
    fewest = min(len(real), len(fake))
    if not 1 <= k < fewest:
        raise ValueError(f"k: expected 1 to {fewest - 1}, one less than the smaller set's points, got {k}")
    real, fake = real.double().flatten(1), fake.double().flatten(1)
    return PrecisionRecall(precision=_covered(fake, real, k), recall=_covered(real, fake, k))


def _covered(points: Tensor, centres: Tensor, k: int) -> float:
    """The fraction of `points` within any centre's ball."""
    # the nearest of all is the centre itself, hence k + 1
    radii = torch.cat([_distances(rows, centres).kthvalue(k + 1, 1).values for rows in centres.split(_BLOCK)])
    inside = [(_distances(rows, centres) <= radii).any(1) for rows in points.split(_BLOCK)]
    return torch.cat(inside).double().mean().item()


def _distances(rows: Tensor, columns: Tensor) -> Tensor:
    return torch.cdist(rows, columns, compute_mode="donot_use_mm_for_euclid_dist")
