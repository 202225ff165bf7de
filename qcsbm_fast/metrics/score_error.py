"""The error of a score against the oracle: the score of the noised empirical distribution."""

from __future__ import annotations

import torch
from torch import Tensor

from qcsbm_fast.metrics.levels import noised_batches
from qcsbm_fast.random import NoiseStream
from qcsbm_fast.sde import ScoreFunction

_BLOCK = 4096  # data points weighed at once


@torch.no_grad()
def oracle_score(x: Tensor, data: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Score `(M, *)` at `x (M, *)` of the equal mixture of N(mean d, std^2 I), d in `data (N, *)`.

    `mean` and `std` are `(M,)`. With w = softmax_d(-||x - mean d||^2 / (2 std^2)) the score is
    (mean sum_d w_d d - x) / std^2. The softmax is taken in one pass over blocks of the data, under a running
    maximum; exponents are formed in float64 and exponentiated in x's dtype. Memory is O(M + N), never M x N.
    """
    flat, points = x.flatten(1), data.to(x).flatten(1)
    mean, std = mean.to(x).unsqueeze(1), std.to(x).unsqueeze(1)
    # up to a constant per row the exponent is (mean x.d - mean^2 ||d||^2 / 2) / std^2: one matrix product
    query = torch.cat((mean * flat.double(), -0.5 * mean.double().square()), 1) / std.double().square()
    keys = torch.cat((points.double(), points.double().square().sum(1, keepdim=True)), 1)
    peak = torch.full_like(query[:, :1], -torch.inf)
    total, moment = torch.zeros_like(peak), torch.zeros_like(flat, dtype=torch.float64)
    for block, block_keys in zip(points.split(_BLOCK), keys.split(_BLOCK), strict=True):
        exponent = query @ block_keys.T
        lower, peak = peak, torch.maximum(peak, exponent.amax(1, keepdim=True))
        weight = (exponent - peak).to(x.dtype).exp_()
        fade = (lower - peak).exp()
        total = total * fade + weight.sum(1, keepdim=True)
        moment = moment * fade + weight @ block
    return ((mean * (moment / total) - flat) / std.square()).to(x.dtype).view_as(x)


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
