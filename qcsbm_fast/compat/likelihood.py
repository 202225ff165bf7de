"""Bits per dimension by the probability-flow ODE: `get_likelihood_fn`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qcsbm_fast.compat.models.utils import get_score_fn
from qcsbm_fast.compat.ode import flow, integrate
from qcsbm_fast.divergence import divergence
from qcsbm_fast.penalty import Distribution, draw_probes
from qcsbm_fast.random import as_stream

_DISTRIBUTIONS: dict[str, Distribution] = {"Rademacher": "rademacher", "Gaussian": "gaussian"}


def get_likelihood_fn(
    sde: Any,
    inverse_scaler: Callable[[Any], Any],
    hutchinson_type: str = "Rademacher",
    rtol: float = 1e-4,
    atol: float = 1e-5,
    method: str = "RK45",
    eps: float = 1e-5,
    energy: bool = False,
) -> Callable[[Any, Tensor], tuple[Tensor, Tensor, int]]:
    """`likelihood_fn(model, data (B, *)) -> (bpd (B,), z (B, *), evaluations)`, by Hutchinson's estimator, one probe.

    `data` is what `inverse_scaler` maps to [0, 1], dequantised from 256 levels; `z` is where the ODE takes it at time
    1. The divergence comes from tangents: no backward. Arguments as `compat.sampling.get_ode_sampler`.

    Raises:
        NotImplementedError: for a `hutchinson_type` other than "Rademacher" and "Gaussian".
        RuntimeError: where the solver fails.
    """
    if hutchinson_type not in _DISTRIBUTIONS:
        raise NotImplementedError(
            f"hutchinson_type: expected one of {', '.join(_DISTRIBUTIONS)}, got {hutchinson_type!r}"
        )

    @torch.no_grad()
    def likelihood_fn(model: Any, data: Tensor) -> tuple[Tensor, Tensor, int]:
        score = get_score_fn(sde, model, False, True, energy, dims=data.dim())
        batch, dim = len(data), data[0].numel()
        v = draw_probes(data, 1, _DISTRIBUTIONS[hutchinson_type], as_stream(None, data.device))

        def velocity(time: float, state: Tensor) -> Tensor:
            x = state[:-batch].to(data.dtype).view(data.shape)
            t = x.new_full((batch,), time)
            value, trace = divergence(lambda y: score(y, t), x, v=v)
            drift, weight, _ = score.sde.reverse(t, probability_flow=True)
            return torch.cat((flow(score.sde, x, t, value).flatten(), drift * dim + weight * trace))

        start = torch.cat((data.double().flatten(), data.new_zeros(batch, dtype=torch.float64)))
        end, evaluations = integrate(velocity, start, eps, 1.0, rtol, atol, method)
        z = end[:-batch].view(data.shape)
        nats = score.sde.prior_log_prob(z) + end[-batch:]
        # the unit of data is half the range that [-1, 1] would be scaled from: 256 levels, 7 or 8 bits
        bits = -nats / (dim * math.log(2)) + 7.0 - inverse_scaler(-1.0)
        return bits.to(data.dtype), z.to(data.dtype), evaluations

    return likelihood_fn
