"""Log-likelihood of a score model by its probability-flow ODE (Song et al. 2021, appendix D)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qcsbm_fast.divergence import divergence
from qcsbm_fast.penalty import draw_probes
from qcsbm_fast.random import NoiseStream, as_stream
from qcsbm_fast.sampling.ode import flow, solve
from qcsbm_fast.sde import ScoreFunction


@torch.no_grad()
def log_likelihood(
    score: ScoreFunction,
    x: Tensor,
    *,
    rtol: float = 1e-3,
    atol: float = 1e-5,
    t_min: float = 1e-5,
    exact: bool = False,
    generator: NoiseStream | torch.Generator | None = None,
    batch_size: int | None = None,
) -> Tensor:
    """Log-density in nats of each sample of `x (B, *)`, `(B,)` in float64, under the model at time `t_min`.

    log p(x) = log prior(x(1)) + integral from t_min to 1 of div v dt along dx/dt = v = f x - g^2 s / 2 from
    x(t_min) = x, with the tolerances of `sampling.ode.solve`; the network runs in x's dtype. The divergence
    of s is `exact` (as many tangents as dimensions), or Hutchinson's with one Rademacher probe a sample,
    drawn from `generator` (None: seeded from torch's own) and held along the path: unbiased, and its spread
    is seen by repeating the call.

    The solver's step is common to a batch: `batch_size` bounds the memory, and moves the result within the
    tolerance.

    Raises RuntimeError where the solver fails.
    """
    stream = as_stream(generator, x.device)
    parts = x.split(batch_size or len(x))
    return torch.cat([_log_likelihood(score, part, rtol, atol, t_min, stream, exact) for part in parts])


def bits_per_dim(nats: Tensor, dim: int, levels: int = 256) -> Tensor:
    """Negative log-likelihood, in bits per dimension, of data with `levels` values, dequantised into [0, 1].

    `nats (B,)` are log-densities on the unit cube of `dim` dimensions: -nats / (dim ln 2) + log2(levels).
    """
    return -nats / (dim * math.log(2.0)) + math.log2(levels)


def _log_likelihood(
    score: ScoreFunction,
    x: Tensor,
    rtol: float,
    atol: float,
    t_min: float,
    stream: NoiseStream,
    exact: bool,
) -> Tensor:
    sde, batch, dim = score.sde, len(x), x[0].numel()
    probe = None if exact else draw_probes(x, 1, "rademacher", stream)

    def velocity(time: float, state: Tensor) -> Tensor:
        position = state[:-batch].to(x.dtype).view(x.shape)
        t = x.new_full((batch,), time)
        s, score_divergence = divergence(lambda y: score(y, t), position, exact=exact, v=probe)
        drift, weight, _ = sde.reverse(t, probability_flow=True)
        flow_divergence = drift * dim + weight * score_divergence
        return torch.cat((flow(sde, position, t, s).flatten(), flow_divergence))

    start = torch.cat((x.double().flatten(), x.new_zeros(batch, dtype=torch.float64)))
    end = solve(velocity, start, t_min, 1.0, rtol=rtol, atol=atol)
    return sde.prior_log_prob(end[:-batch].view(x.shape)) + end[-batch:]
