"""Measurements of a score model on held-out data."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qcsbm_fast import ops
from qcsbm_fast.penalty import asymmetry, draw_probes
from qcsbm_fast.random import NoiseStream
from qcsbm_fast.score import Score
from qcsbm_fast.train.distributed import Processes

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
    processes: Processes = Processes(),  # noqa: B008  it does not change
) -> tuple[Tensor, Tensor]:
    """Times `(L,)`, the midpoints of L equal parts of [0, 1], and at each the `NAMES` of each of `x0 (N, *)`.

    The latter are `(3, L, N)` in float64: the denoising loss, Asym = 1/2 ||J - J^T||_F^2 and NAsym = 1/4 ||J -
    J^T||_F^2 / ||J||_F^2, J the Jacobian of the score at noised data, by `probes` Rademacher probes or from
    the whole Jacobian. Of several `processes`, which all call this, each works off its share of the samples.
    """
    times = (torch.arange(levels, device=x0.device) + 0.5) / levels
    mine = slice(processes.rank, None, processes.world)
    batches = [
        torch.stack([_measure(score, part, time, stream, probes, exact, half, mine) for time in times], 1)
        for part in x0.split(batch_size)
    ]
    return times, processes.sum(torch.cat(batches, 2))


def over_levels(values: Tensor) -> dict[str, Estimate]:
    """Means over levels and samples of what `measure` gives, N at least 2.

    The standard errors are those of the samples' own means over the levels, since a sample's levels go together.
    """
    values = values.mean(1)
    errors = values.std(1) / values.shape[1] ** 0.5
    rows = zip(NAMES, values.mean(1).tolist(), errors.tolist(), strict=True)
    return {name: Estimate(mean, error) for name, mean, error in rows}


def evaluate(score: Score, x0: Tensor, stream: NoiseStream, **settings: Any) -> dict[str, float]:
    """`over_levels` as plain numbers called `test_<name>`, with their standard errors (`test_<name>_error`).

    Arguments as `measure`.
    """
    _, values = measure(score, x0, stream, **settings)
    found = over_levels(values)
    return {f"test_{name}": value.mean for name, value in found.items()} | {
        f"test_{name}_error": value.error for name, value in found.items()
    }


def _measure(
    score: Score,
    x0: Tensor,
    time: Tensor,
    stream: NoiseStream,
    probes: int,
    exact: bool,
    half: bool,
    mine: slice,
) -> Tensor:
    """Denoising loss, Asym and NAsym of each sample at one time, `(3, N)`, zero but for one's own."""
    t = time.repeat(len(x0))
    mean, std = score.sde.marginal(t)
    x, z = ops.perturb(x0, mean, std, stream.draw())
    v = None if exact else draw_probes(x, probes, "rademacher", stream)[:, mine]
    found = torch.zeros(len(NAMES), len(x0), dtype=torch.float64, device=x0.device)
    x, z, t, std = x[mine], z[mine], t[mine], std[mine]
    if len(x):
        result = asymmetry(lambda y: score(y, t), x, v=v, exact=exact)
        weight = torch.full_like(std, 0.5 if half else 1.0)
        loss = ops.denoising_residual(result.score, std, weight, z=z)
        found[:, mine] = torch.stack((loss, result.penalty, result.nasym)).double()
    return found
