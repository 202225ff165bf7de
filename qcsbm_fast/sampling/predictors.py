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

from qcsbm_fast.sde import OU, SDE, VE, VP

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


def exponential(sde: SDE, t: Tensor, steps: int) -> Coefficients:
    """The exponential integrator: the reverse-time process from t to the next time, with the score held at
    its value.

    With r = m(next) / m(t) > 1 and the process at rest N(0, S^2 I),

        x' = r x + 2 S^2 (r - 1) s + S sqrt(r^2 - 1) z

    (Chen et al. 2023, arXiv 2209.11215, with time rescaled for VP). The times are those of `steps` even ones
    from 1 to 0; the last step is empty. For OU and VP only, ValueError otherwise.
    """
    if not isinstance(sde, (OU, VP)):
        raise ValueError(
            "predictor: expected 'euler-maruyama' or 'reverse-diffusion', got 'exponential', which is "
            f"defined for OU and VP and not for {type(sde).__name__}"
        )
    following = (t - 1.0 / (steps - 1)).clamp(min=0.0)
    # r - 1 and r^2 - 1 without cancellation
    growth = sde.log_mean(following) - sde.log_mean(t)
    variance = sde.prior_std**2
    noise = torch.sqrt(variance * torch.expm1(2.0 * growth))
    return torch.exp(growth), 2.0 * variance * torch.expm1(growth), noise


PREDICTORS: dict[str, Callable[[SDE, Tensor, int], Coefficients]] = {
    "euler-maruyama": euler_maruyama,
    "reverse-diffusion": reverse_diffusion,
    "ancestral": ancestral,
    "exponential": exponential,
}
