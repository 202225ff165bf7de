"""Noised data, level by level and batch by batch, and what is measured of each sample there."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qcsbm_fast import ops
from qcsbm_fast.penalty import asymmetry, draw_probes
from qcsbm_fast.random import NoiseStream
from qcsbm_fast.sde import SDE, ScoreFunction

NAMES = ("dsm", "asym", "nasym")
_ALL = slice(None)


def noised_batches(
    sde: SDE, x0: Tensor, time: Tensor, stream: NoiseStream, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield `(x_t (b, *), t (b,))` with x_t drawn given each sample of `x0 (N, *)` at the one `time ()`."""
    for batch in x0.split(batch_size):
        t = time.to(batch).repeat(len(batch))
        mean, std = sde.marginal(t)
        yield ops.perturb(batch, mean, std, stream.draw(), store_noise=False)[0], t


@torch.no_grad()
def measure_level(
    score: ScoreFunction,
    x0: Tensor,
    time: Tensor,
    stream: NoiseStream,
    *,
    probes: int,
    exact: bool,
    half: bool,
    mine: slice = _ALL,
) -> Tensor:
    """The `NAMES` of each sample of `x0 (N, *)` noised at the one `time ()`: `(3, N)` in float64.

    The denoising loss ||std s + z||^2, with `half` half of it, Asym = 1/2 ||J - J^T||_F^2 and NAsym = 1/4 ||J -
    J^T||_F^2 / ||J||_F^2, J the score's Jacobian, by `probes` Rademacher probes or, with `exact`, from the whole
    Jacobian. Noise and probes, for all samples, come from `stream`; those outside `mine` are left at zero.
    """
    t = time.to(x0).repeat(len(x0))
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
