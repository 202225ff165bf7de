"""Measurements of a score model on held-out data."""

from __future__ import annotations

import torch
from torch import Tensor

from qcsbm_fast import ops, penalty
from qcsbm_fast.random import NoiseStream
from qcsbm_fast.score import Score

_BATCH = 1000


@torch.no_grad()
def evaluate(
    score: Score, x0: Tensor, stream: NoiseStream, *, levels: int, probes: int, exact: bool, half: bool
) -> dict[str, float]:
    """Denoising loss, Asym and NAsym on `x0 (N, *)`, N at least 2, and their standard errors (`..._error`).

    Each is a mean over the samples and over `levels` times, the midpoints of equal parts of [0, 1]. The
    standard errors are those of the samples' own means over the levels, since a sample's levels go together.
    Asym is 1/2 ||J - J^T||_F^2 and NAsym 1/4 ||J - J^T||_F^2 / ||J||_F^2, J the Jacobian of the score at
    noised data, by `probes` Rademacher probes or from the whole Jacobian.
    """
    times = (torch.arange(levels, device=x0.device) + 0.5) / levels
    batches = [
        torch.stack([_measure(score, part, time, stream, probes, exact, half) for time in times]).mean(0)
        for part in x0.split(_BATCH)
    ]
    values = torch.cat(batches, 1)
    means = values.mean(1).tolist()
    errors = (values.std(1) / values.shape[1] ** 0.5).tolist()
    names = ("test_dsm", "test_asym", "test_nasym")
    return dict(zip(names, means, strict=True)) | {
        f"{name}_error": error for name, error in zip(names, errors, strict=True)
    }


def _measure(
    score: Score, x0: Tensor, time: Tensor, stream: NoiseStream, probes: int, exact: bool, half: bool
) -> Tensor:
    """Denoising loss, Asym and NAsym of each sample at one time, `(3, N)`."""
    t = time.repeat(len(x0))
    mean, std = score.sde.marginal(t)
    x, z = ops.perturb(x0, mean, std, stream.draw())
    result = penalty.asymmetry(lambda y: score(y, t), x, probes=probes, exact=exact, generator=stream)
    weight = torch.full_like(std, 0.5 if half else 1.0)
    loss = ops.denoising_residual(result.score, std, weight, z=z)
    return torch.stack((loss, result.penalty, result.nasym)).double()
