"""The error of a score against the oracle: the score of the noised empirical distribution."""

from __future__ import annotations

import torch
from torch import Tensor

from qcsbm_fast.metrics.levels import noised_batches
from qcsbm_fast.random import NoiseStream
from qcsbm_fast.sde import ScoreFunction

# samples by data points weighed at once: 2 MiB of exponents, which stay in cache
_ROWS, _COLUMNS = 256, 1024


@torch.no_grad()
def oracle_score(x: Tensor, data: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Score `(M, *)` at `x (M, *)` of the equal mixture of N(mean d, std^2 I), d in `data (N, *)`.

    `mean` and `std` are `(M,)`. With w = softmax_d(-||x - mean d||^2 / (2 std^2)) the score is
    (mean sum_d w_d d - x) / std^2. The softmax is taken in one pass over blocks of the data, under a running
    maximum; exponents are formed in float64 and exponentiated in x's dtype. Memory is O(M + N), never M x N.
    """
    points = data.to(x).flatten(1)
    keys = torch.cat((points.double(), points.double().square().sum(1, keepdim=True)), 1)
    columns = list(zip(points.split(_COLUMNS), keys.split(_COLUMNS), strict=True))
    rows = zip(x.flatten(1).split(_ROWS), mean.to(x).split(_ROWS), std.to(x).split(_ROWS), strict=True)
    return torch.cat([_oracle_rows(flat, m, s, columns) for flat, m, s in rows]).view_as(x)


def _oracle_rows(flat: Tensor, mean: Tensor, std: Tensor, columns: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Oracle score `(m, D)` at `flat (m, D)`; `columns` are blocks of points d and of (d, ||d||^2)."""
    mean, std = mean.unsqueeze(1), std.unsqueeze(1)
    # up to a constant per row the exponent is (mean x.d - mean^2 ||d||^2 / 2) / std^2: one matrix product
    query = torch.cat((mean * flat.double(), -0.5 * mean.double().square()), 1) / std.double().square()
    peak = torch.full_like(query[:, :1], -torch.inf)
    total, moment = torch.zeros_like(peak), torch.zeros_like(flat, dtype=torch.float64)
    for block, keys in columns:
        exponent = query @ keys.T
        lower, peak = peak, torch.maximum(peak, exponent.amax(1, keepdim=True))
        # exp(-80) is nothing beside 1, and smaller weights would be denormal, ten times slower
        weight = exponent.sub_(peak).clamp_(min=-80.0).to(flat.dtype).exp_()
        fade = (lower - peak).exp()
        total = total * fade + weight.sum(1, keepdim=True)
        moment = moment * fade + weight @ block
    return ((mean * (moment / total) - flat) / std.square()).to(flat.dtype)


@torch.no_grad()
def score_error(
    score: ScoreFunction,
    data: Tensor,
    x0: Tensor,
    times: Tensor,
    stream: NoiseStream,
    *,
    batch_size: int = 1000,
) -> Tensor:
    """Mean of 1/2 ||s_oracle - s||^2 at each of `times (L,)`: `(L,)` in float64.

    `data (N, *)` is the empirical distribution of the oracle, `x0 (M, *)` are the samples noised at each
    level. The score error of arXiv 2209.12753, section 3.2, is the mean over the levels.
    """
    levels = []
    for time in times:
        errors = []
        for x, t in noised_batches(score.sde, x0, time, stream, batch_size):
            gap = score(x, t) - oracle_score(x, data, *score.sde.marginal(t))
            errors.append(0.5 * gap.flatten(1).double().square().sum(1))
        levels.append(torch.cat(errors).mean())
    return torch.stack(levels)
