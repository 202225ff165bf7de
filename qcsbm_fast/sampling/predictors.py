"""Predictors: one step of the reverse-time process, in linear form.

A predictor maps a process, times `t (B,)` and the number of steps that [0, 1] is cut into to `(a, b, c)`,
each `(B,)`: with the score s at t and z standard normal the step is x' = a x + b s + c z. `ops.sde_step`
takes it so.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from qcsbm_fast.sde import SDE, VE, VP

Coefficients = tuple[Tensor, Tensor, Tensor]


def euler_maruyama(sde: SDE, t: Tensor, steps: int) -> Coefficients:
    """x' = x - (f x - g^2 s) / steps + g / sqrt(steps) z."""
    drift, weight, noise = sde.reverse(t)
    return 1.0 - drift / steps, -weight / steps, noise / math.sqrt(steps)


def reverse_diffusion(sde: SDE, t: Tensor, steps: int) -> Coefficients:
    """x' = x - (f x - G^2 s) + G z with the forward chain's own f and G (Song et al. 2021, appendix E)."""
    drift, weight, noise = sde.reverse_discretize(t, steps)
    return 1.0 - drift, -weight, noise


def ancestral(sde: SDE, t: Tensor, steps: int) -> Coefficients:
    """The step of the chain's ancestral sampler: for VE and VP only, ValueError otherwise.

    VE (Song et al. 2021, equation 47): x' = x + G^2 s + (sigma_{i-1} / sigma_i) G z, where G^2 = sigma_i^2 -
    sigma_{i-1}^2. VP (Ho et al. 2020): x' = (x + beta_i s) / sqrt(1 - beta_i) + sqrt(beta_i) z.
    """
    if isinstance(sde, VE):
        sigma, below = sde.noise_levels(t, steps)
        _, growth = sde.discretize(t, steps)
        return torch.ones_like(t), growth.square(), below / sigma * growth
    if isinstance(sde, VP):
        beta = sde.step_beta(t, steps)
        scale = torch.rsqrt(1.0 - beta)
        return scale, beta * scale, torch.sqrt(beta)
    raise ValueError(
        "predictor: expected 'euler-maruyama' or 'reverse-diffusion', got 'ancestral', which is defined for "
        f"VE and VP and not for {type(sde).__name__}"
    )


PREDICTORS: dict[str, Callable[[SDE, Tensor, int], Coefficients]] = {
    "euler-maruyama": euler_maruyama,
    "reverse-diffusion": reverse_diffusion,
    "ancestral": ancestral,
}
