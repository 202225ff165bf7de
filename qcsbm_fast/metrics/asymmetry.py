"""Asym and NAsym, how far a score is from a gradient field, level by level (arXiv 2209.12753)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qcsbm_fast.metrics.levels import measure_level
from qcsbm_fast.random import NoiseStream
from qcsbm_fast.sde import ScoreFunction


@dataclass(frozen=True)
class AsymmetryByLevel:
    """Means over the samples at each of `times (L,)`, and their standard errors, each `(L,)` in float64.

    `asym` estimates E 1/2 ||J - J^T||_F^2 and `nasym` E (1/4 ||J - J^T||_F^2 / ||J||_F^2), J the score's
    Jacobian. The standard errors hold the spread over samples, noise and probes.
    """

    times: Tensor
    asym: Tensor
    asym_error: Tensor
    nasym: Tensor
    nasym_error: Tensor


@torch.no_grad()
def asymmetry_by_level(
    score: ScoreFunction,
    x0: Tensor,
    times: Tensor,
    stream: NoiseStream,
    *,
    probes: int = 1,
    exact: bool = False,
    batch_size: int = 1000,
) -> AsymmetryByLevel:
    """Asym and NAsym of `score` on `x0 (N, *)` noised at each of `times (L,)`, N at least 2.

    With `exact` from the whole Jacobian, otherwise from `probes` Rademacher probes a sample. The noise and
    the probes come from `stream`. Leaves no graph.
    """
    rows = []
    for time in times:
        batches = [
            measure_level(score, part, time, stream, probes=probes, exact=exact, half=True)[1:]
            for part in x0.split(batch_size)
        ]
        values = torch.cat(batches, 1)
        error = values.std(1) / values.shape[1] ** 0.5
        rows.append(torch.cat((values.mean(1), error)))
    asym, nasym, asym_error, nasym_error = torch.stack(rows, 1)
    return AsymmetryByLevel(times, asym, asym_error, nasym, nasym_error)
