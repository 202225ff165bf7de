"""Measurements of a score model on held-out data."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qcsbm_fast import ops, penalty
from qcsbm_fast.random import NoiseStream
from qcsbm_fast.score import Score

_BATCH = 1000
NAMES = ("dsm", "asym", "nasym")


class Estimate(NamedTuple):
    """A mean and its standard error."""

    mean: float
    error: float


@torch.no_grad()
def measure(
    score: Score,
    x0: Tensor,
    stream: NoiseStream,
    *,
    levels: int,
    probes: int,
    exact: bool,
    half: bool,
    batch_size: int = _BATCH,
) -> tuple[Tensor, Tensor]:
    """Times `(L,)`, the midpoints of L equal parts of [0, 1], and at each the `NAMES` of each of `x0 (N, *)`.

    The latter are `(3, L, N)` in float64: the denoising loss, Asym = 1/2 ||J - J^T||_F^2 and NAsym = 1/4 ||J -
    J^T||_F^2 / ||J||_F^2, J the Jacobian of the score at noised data, by `probes` Rademacher probes or from
    the whole Jacobian.
    """
    times = (torch.arange(levels, device=x0.device) + 0.5) / levels
    batches = [
        torch.stack([_measure(score, part, time, stream, probes, exact, half) for time in times], 1)
        for part in x0.split(batch_size)
    ]
    return times, torch.cat(batches, 2)


def over_levels(values: Tensor) -> dict[str, Estimate]:
    """Means over levels and samples of what `measure` gives, N at least 2.

    The standard errors are those of the samples' own means over the levels, since a sample's levels go together.
    """
    values = values.mean(1)
    errors = values.std(1) / values.shape[1] ** 0.5
    rows = zip(NAMES, values.mean(1).tolist(), errors.tolist(), strict=True)
    return {name: Estimate(mean, error) for name, mean, error in rows}


def evaluate(
    score: Score, x0: Tensor, stream: NoiseStream, *, levels: int, probes: int, exact: bool, half: bool
) -> dict[str, float]:
    """`over_levels` as plain numbers called `test_<name>`, with their standard errors (`test_<name>_error`)."""
    _, values = measure(score, x0, stream, levels=levels, probes=probes, exact=exact, half=half)
    found = over_levels(values)
    return {f"test_{name}": value.mean for name, value in found.items()} | {
        f"test_{name}_error": value.error for name, value in found.items()
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
