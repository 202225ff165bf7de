"""Log-likelihood of a score model by its probability-flow ODE (Song et al. 2021, appendix D)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qcsbm_fast.divergence import divergence
from qcsbm_fast.ops.registry import per_row
from qcsbm_fast.random import NoiseStream, as_stream
from qcsbm_fast.sampling.dormand_prince import solve
from qcsbm_fast.sampling.ode import levels, log_noise, scale_at
from qcsbm_fast.sampling.progress import log_noise_bar
from qcsbm_fast.sde import ScoreFunction


@torch.no_grad()
def log_likelihood(
    score: ScoreFunction,
    x: Tensor,
    *,
    rtol: float = 1e-4,
    atol: float = 1e-5,
    t_min: float = 1e-5,
    exact: bool = False,
    probes: int = 1,
    generator: NoiseStream | torch.Generator | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> Tensor:
    """Log-density in nats of each sample of `x (B, *)`, `(B,)` in float64, under the model at time `t_min`.

    In the coordinates y = x / m, l = log(std / m) of `sampling.ode`, along the flow from x(t_min) = x,

        log p(x) = log prior(x(1)) + D log(m(1) / m(t_min)) - integral of std^2 div s dl,

    each sample with steps of its own, to the tolerances `rtol` and `atol` on y and on the integral; the
    network runs in x's dtype. The divergence of s is `exact` (as many tangents as dimensions), or
    Hutchinson's with `probes` Rademacher probes a sample, drawn from `generator` (None: seeded from torch's
    own) and held along the path: unbiased. `batch_size` bounds the memory. `progress` shows a bar of the log-noise
    that the slowest sample has covered, batch after batch.

    Raises:
        ValueError: for fewer than one probe, or where std is 0 at t_min.
        RuntimeError: where the solver fails.
    """
    if probes < 1:
        raise ValueError(f"probes: expected at least 1, got {probes}")
    v = None
    if not exact:
        stream = as_stream(generator, x.device)
        v = torch.stack([stream.rademacher(x.shape, x.dtype) for _ in range(probes)])
    size = batch_size or max(len(x), 1)
    start, end, parts = log_noise(score.sde, t_min), log_noise(score.sde, 1.0), []
    batches = math.ceil(len(x) / size)
    with log_noise_bar(0.0, batches * (end - start), name="likelihood", shown=progress) as covered:
        for batch, part in enumerate(x.split(size)):
            probe = None if v is None else v[:, batch * size : (batch + 1) * size]
            before = batch * (end - start) - start
            reached = None if covered is None else lambda noise, before=before: covered(before + noise)
            parts.append(_log_likelihood(score, part, probe, rtol, atol, t_min, reached))
    return torch.cat(parts)


def _log_likelihood(
    score: ScoreFunction,
    x: Tensor,
    v: Tensor | None,
    rtol: float,
    atol: float,
    t_min: float,
    reached: Callable[[float], None] | None,
) -> Tensor:
    """As `log_likelihood`, with the probes `v (K, B, *)`, None for the exact divergence."""
    sde, dim = score.sde, x[0].numel()

    def velocity(noise: Tensor, state: Tensor, rows: Tensor) -> Tensor:
        t, mean, std = levels(sde, noise)
        position = (per_row(mean, state) * state[:, :-1]).to(x.dtype).view(-1, *x.shape[1:])
        times = t.to(x.dtype)
        probe = None if v is None else v[:, rows]
        s, spread = divergence(lambda at: score(at, times), position, exact=v is None, v=probe)
        flow = -per_row(std.square() / mean, state) * s.flatten(1)
        return torch.cat((flow, (-std.square() * spread)[:, None]), 1)

    start = torch.cat((x.double().flatten(1) / scale_at(sde, t_min), x.new_zeros(len(x), 1).double()), 1)
    span = log_noise(sde, t_min), log_noise(sde, 1.0)
    end = solve(velocity, start, *span, rtol=rtol, atol=atol, reached=reached)
    stretch = dim * float(sde.log_mean(torch.tensor([t_min, 1.0]).double()).diff())
    return sde.prior_log_prob(end[:, :-1] * scale_at(sde, 1.0)) + stretch + end[:, -1]


@dataclass(frozen=True)
class BitsPerDim:
    """Bits per dimension of a data set, and how sure they are.

    Attributes:
        mean: over samples and repeats.
        error: standard error over the samples, each the mean of its repeats: what another data set could
            change.
        repeat_error: standard error over the repeats' means: what dequantisation and probes change. NaN for
            one repeat.
        repeats: `(R,)` in float64, the repeats' means.
    """

    mean: float
    error: float
    repeat_error: float
    repeats: Tensor


def dequantized_bits_per_dim(
    score: ScoreFunction,
    x: Tensor,
    stream: NoiseStream,
    *,
    repeats: int = 5,
    quantization: int = 256,
    rtol: float = 1e-4,
    atol: float = 1e-5,
    t_min: float = 1e-5,
    exact: bool = False,
    probes: int = 1,
    batch_size: int = 100,
    progress: bool = False,
) -> BitsPerDim:
    """Bits per dimension of data `x (B, *)` in [0, 1] with `quantization` even values, B at least 2.

    Each of the `repeats` draws fresh probes and spreads every value evenly over its share of the unit
    interval, (x (Q - 1) + u) / Q (uniform dequantisation: an upper bound on the discrete model's bits; Theis
    et al. 2016). The other arguments are those of `log_likelihood`; the defaults are the paper's.

    Raises ValueError where `x` is outside [0, 1], and as `log_likelihood`.
    """
    if x.numel() and not (x.min() >= 0 and x.max() <= 1):
        raise ValueError(f"x: expected values in [0, 1], got {x.min().item():g} to {x.max().item():g}")
    rows = []
    for _ in range(repeats):
        spread = ((quantization - 1) * x + stream.uniform(x.shape, x.dtype)) / quantization
        nats = log_likelihood(
            score, spread, rtol=rtol, atol=atol, t_min=t_min, exact=exact, probes=probes, generator=stream,
            batch_size=batch_size, progress=progress,
        )  # fmt: skip
        rows.append(bits_per_dim(nats, x[0].numel(), quantization))
    bits = torch.stack(rows)
    means = bits.mean(1)
    return BitsPerDim(
        mean=means.mean().item(),
        error=bits.mean(0).std().item() / math.sqrt(len(x)),
        repeat_error=means.std().item() / math.sqrt(repeats) if repeats > 1 else math.nan,
        repeats=means,
    )


def bits_per_dim(nats: Tensor, dim: int, levels: int = 256) -> Tensor:
    """Negative log-likelihood, in bits per dimension, of data with `levels` values, dequantised into [0, 1].

    `nats (B,)` are log-densities on the unit cube of `dim` dimensions: -nats / (dim ln 2) + log2(levels).
    """
    return -nats / (dim * math.log(2.0)) + math.log2(levels)
