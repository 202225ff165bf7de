"""The probability-flow ODE: sampling, and the adaptive solver it shares with the likelihood."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from qcsbm_fast.ops.registry import per_row
from qcsbm_fast.random import NoiseStream
from qcsbm_fast.sde import SDE, ScoreFunction


@torch.no_grad()
def probability_flow(
    score: ScoreFunction,
    size: Sequence[int],
    *,
    stream: NoiseStream,
    rtol: float = 1e-3,
    atol: float = 1e-5,
    t_min: float = 1e-5,
    denoise: bool = True,
) -> Tensor:
    """Draw samples of shape `size` (batch first), float32 on the stream's device, by dx/dt = f x - g^2 s / 2.

    The ODE runs from the prior at t = 1 to `t_min` with the tolerances of `solve`, the network in float32.
    `denoise` ends with the posterior mean of x_0 at t_min, (x + std^2 s) / m (Tweedie's formula).

    Raises RuntimeError where the solver fails.
    """
    sde = score.sde
    prior = sde.prior_sample(size, stream)

    def velocity(time: float, state: Tensor) -> Tensor:
        x = state.to(prior.dtype)
        t = x.new_full((len(x),), time)
        return flow(sde, x, t, score(x, t))

    x = solve(velocity, prior, 1.0, t_min, rtol=rtol, atol=atol).to(prior.dtype)
    if denoise:
        t = x.new_full((len(x),), t_min)
        mean, std = sde.marginal(t)
        x = (x + per_row(std, x).square() * score(x, t)) / per_row(mean, x)
    return x


def flow(sde: SDE, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """dx/dt of the probability-flow ODE, f(t) x - g(t)^2 s / 2, with the score `s (B, *)` at `x (B, *)`."""
    drift, weight, _ = sde.reverse(t, probability_flow=True)
    return per_row(drift, x) * x + per_row(weight, x) * s


def solve(
    velocity: Callable[[float, Tensor], Tensor],
    state: Tensor,
    start: float,
    end: float,
    *,
    rtol: float,
    atol: float,
) -> Tensor:
    """The state at time `end`, in float64, of d state / dt = velocity(t, state) from `state` at time `start`.

    Dormand and Prince's adaptive 5(4) pair (SciPy's RK45) on the whole state as one vector: the error
    estimate of a step, divided by atol + rtol |state| entry by entry, has a root mean square of at most 1.

    Raises RuntimeError where the velocity is not finite or the step vanishes.
    """
    from scipy.integrate import solve_ivp

    def flat_velocity(time: float, flat: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(flat).view(state.shape).to(state.device)
        rate = velocity(time, x)
        if not rate.isfinite().all():  # the solver would loop for ever on a NaN step size
            raise RuntimeError(f"the ODE's velocity is not finite at t = {time}: check the score there")
        return rate.double().flatten().cpu().numpy()

    initial = state.double().flatten().cpu().numpy()
    # t_eval keeps the last state only
    solution = solve_ivp(flat_velocity, (start, end), initial, t_eval=[end], rtol=rtol, atol=atol)
    if not solution.success:
        raise RuntimeError(
            f"the ODE solver stopped between t = {start} and {end}: {solution.message} Loosen rtol and atol"
        )
    return torch.from_numpy(solution.y[:, -1].copy()).view(state.shape).to(state.device)
