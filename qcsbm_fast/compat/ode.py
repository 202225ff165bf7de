"""The probability-flow ODE by SciPy's solvers, for the arguments `method`, `rtol`, `atol` of the authors' functions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from qcsbm_fast.ops.registry import per_row
from qcsbm_fast.sde import SDE


def flow(process: SDE, x: Tensor, t: Tensor, score: Tensor) -> Tensor:
    """dx/dt `(B, *)` at `x (B, *)`, `t (B,)`: `f x - g^2 s / 2`."""
    drift, weight, _ = process.reverse(t, probability_flow=True)
    return per_row(drift, x) * x + per_row(weight, x) * score


def integrate(
    velocity: Callable[[float, Tensor], Tensor],
    state: Tensor,
    start: float,
    end: float,
    rtol: float,
    atol: float,
    method: str,
) -> tuple[Tensor, int]:
    """The state at time `end` of d state / dt = velocity(t, state), in float64, and the number of evaluations.

    Raises:
        RuntimeError: where the velocity is not finite or the solver stops early.
    """
    from scipy.integrate import solve_ivp

    def flat_velocity(time: float, flat: np.ndarray) -> np.ndarray:
        rate = velocity(time, torch.from_numpy(flat).view(state.shape).to(state.device))
        if not rate.isfinite().all():
            raise RuntimeError(f"the ODE's velocity is not finite at t = {time}: check the score there")
        return rate.double().flatten().cpu().numpy()

    flat = state.double().flatten().cpu().numpy()
    solution = solve_ivp(flat_velocity, (start, end), flat, method, t_eval=[end], rtol=rtol, atol=atol)
    if not solution.success:
        raise RuntimeError(f"the ODE solver stopped between t = {start} and {end}: {solution.message}")
    return torch.from_numpy(solution.y[:, -1].copy()).view(state.shape).to(state.device), solution.nfev
