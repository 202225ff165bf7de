"""Precision, recall, density and coverage by nearest-neighbour manifolds.

The manifold of a set is the union of the closed balls around its points, each reaching to the point's k-th nearest
neighbour in the set, itself not counted. Distances are Euclidean, in float64, without the expansion into
products (which cancels). Memory is O(max(N, M)).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_BLOCK = 1024  # rows of the distance matrix held at once


class PrecisionRecall(NamedTuple):
    """Two fractions in [0, 1]."""

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """Density, not negative and 1 on average for equal laws, and coverage, a fraction in [0, 1]."""

    density: float
    coverage: float


@torch.no_grad()
def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> PrecisionRecall:
    """How much of `fake (M, *)` lies on the manifold of `real (N, *)`, and the reverse (Kynkaanniemi et al. 2019).

    Precision is the fraction of `fake` on the manifold of `real`, recall the fraction of `real` on that of
    `fake`.

    Raises ValueError where k < 1, a set has k points or fewer, or the samples' shapes differ.
    """
    _check(real, fake, k, min(len(real), len(fake)))
    real, fake = real.double().flatten(1), fake.double().flatten(1)
    return PrecisionRecall(
        precision=_count(fake, real, k).gt(0).double().mean().item(),
        recall=_count(real, fake, k).gt(0).double().mean().item(),
    )


@torch.no_grad()
def density_coverage(real: Tensor, fake: Tensor, k: int = 5) -> DensityCoverage:
    """How densely `fake (M, *)` lies on the manifold of `real (N, *)`, and how much of it has any (Naeem et al. 2020).

    Density is the mean over `fake` of the number of balls around `real` that hold it, over k: outliers of
    `real`, whose balls are large, count little. Coverage is the fraction of the balls that hold any of `fake`.

    Raises ValueError where k < 1, `real` has k points or fewer, or the samples' shapes differ.
    """
    _check(real, fake, k, len(real))
    real, fake = real.double().flatten(1), fake.double().flatten(1)
    radii = _radii(real, k)
    nearest = torch.cat([_distances(rows, fake).amin(1) for rows in real.split(_BLOCK)])
    return DensityCoverage(
        density=_count(fake, real, k).double().mean().item() / k,
        coverage=(nearest <= radii).double().mean().item(),
    )


def _check(real: Tensor, fake: Tensor, k: int, fewest: int) -> None:
    if real.shape[1:] != fake.shape[1:]:
        shapes = f"{tuple(real.shape[1:])} and {tuple(fake.shape[1:])}"
        raise ValueError(f"real, fake: expected samples of one shape, got {shapes}")
    if not 1 <= k < fewest:
        raise ValueError(f"k: expected 1 to {fewest - 1}, one less than the set's points, got {k}")


def _count(points: Tensor, centres: Tensor, k: int) -> Tensor:
    """In how many of the balls around `centres` each of `points` lies."""
    radii = _radii(centres, k)
    return torch.cat([(_distances(rows, centres) <= radii).sum(1) for rows in points.split(_BLOCK)])


def _radii(centres: Tensor, k: int) -> Tensor:
    # the nearest of all is the centre itself, hence k + 1
    return torch.cat([_distances(rows, centres).kthvalue(k + 1, 1).values for rows in centres.split(_BLOCK)])


def _distances(rows: Tensor, columns: Tensor) -> Tensor:
    return torch.cdist(rows, columns, compute_mode="donot_use_mm_for_euclid_dist")
