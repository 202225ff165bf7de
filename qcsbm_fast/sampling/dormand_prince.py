"""Dormand and Prince's adaptive 5(4) pair, every sample with steps of its own."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`(times (b,), states (b, N), rows (b,)) -> (b, N)`, all float64, `rows` the samples' indices in the
batch."""

# Dormand & Prince 1980, table 2. The last row of _A is also the fifth-order solution, so that its stage is
# the next step's first; _E is that solution less the embedded fourth-order one.
_C = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_A = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_E = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
_SAFETY, _SHRINK, _GROW = 0.9, 0.2, 10.0


@torch.no_grad()
def solve(
    velocity: Velocity,
    state: Tensor,
    start: float,
    end: float,
    *,
    rtol: float,
    atol: float,
    reached: Callable[[float], None] | None = None,
) -> Tensor:
    """The states `(B, N)` at time `end`, in float64, of dy/dt = velocity from `state (B, N)` at time `start`.

    In each sample by itself, a step's error estimate, divided by atol + rtol |y| entry by entry, has a root
    mean square of at most 1: a sample's path does not depend on the others. Those that have arrived are not
    evaluated any more. `reached` is called on the way with the time that the slowest sample has reached.

    Raises RuntimeError where a step vanishes or the velocity is not finite.
    """
    result = state.double().clone()
    y, rows = result, torch.arange(len(result), device=result.device)
    t = y.new_full(rows.shape, start)
    slope = velocity(t, y, rows)
    if not slope.isfinite().all():
        raise RuntimeError(f"the ODE's velocity is not finite at t = {start}: check the score there")
    step = _first_step(velocity, t, y, rows, slope, end - start, rtol, atol)
    limit = torch.full_like(t, _GROW)
    while len(rows):
        last = step.abs() >= (end - t).abs()
        step = torch.where(last, end - t, step)
        stages = y.new_empty(len(_A), *y.shape)
        stages[0] = slope
        new = y
        for i in range(1, len(_A)):
            new = y + step[:, None] * torch.tensordot(y.new_tensor(_A[i]), stages[:i], 1)
            stages[i] = velocity(t + _C[i] * step, new, rows)
        error = step[:, None] * torch.tensordot(y.new_tensor(_E), stages, 1)
        size = _rms(error / (atol + rtol * torch.maximum(y.abs(), new.abs())))
        size = size.nan_to_num(nan=torch.inf)
        accepted = size <= 1.0
        t = torch.where(accepted, torch.where(last, end, t + step), t)
        y = torch.where(accepted[:, None], new, y)
        slope = torch.where(accepted[:, None], stages[-1], slope)
        step = step * torch.minimum((_SAFETY * size.pow(-0.2)).clamp(_SHRINK, _GROW), limit)
        limit = torch.where(accepted, _GROW, 1.0)  # no growth right after a rejection
        _check_step(step, t, size, accepted, start, end)
        arrived = accepted & last
        if arrived.any():
            result[rows[arrived]] = y[arrived]
            t, y, rows, slope, step, limit = (v[~arrived] for v in (t, y, rows, slope, step, limit))
        if reached:
            reached((t.min() if start < end else t.max()).item() if len(t) else end)
    return result


def _first_step(
    velocity: Velocity,
    t: Tensor,
    y: Tensor,
    rows: Tensor,
    slope: Tensor,
    span: float,
    rtol: float,
    atol: float,
) -> Tensor:
    """Step sizes `(B,)` from the sizes of the first two derivatives (Hairer, Norsett & Wanner, section
    II.4)."""
    scale = atol + rtol * y.abs()
    first = _rms(slope / scale)
    trial = (0.01 * _rms(y / scale) / first).nan_to_num(1e-6, posinf=1e-6).clamp(1e-6, abs(span))
    trial = trial * math.copysign(1.0, span)
    change = velocity(t + trial, y + trial[:, None] * slope, rows) - slope
    second = _rms(change / scale) / trial.abs()
    size = (0.01 / torch.maximum(first, second)).pow(0.2).nan_to_num(1e-6)
    return torch.minimum(100.0 * trial.abs(), size).clamp(max=abs(span)) * math.copysign(1.0, span)


def _check_step(step: Tensor, t: Tensor, size: Tensor, accepted: Tensor, start: float, end: float) -> None:
    smallest = 1e-14 * max(abs(start), abs(end))
    vanished = ~accepted & (step.abs() < smallest)
    if vanished.any():
        time, finite = t[vanished][0].item(), bool(size[vanished][0].isfinite())
        reason = "loosen rtol and atol" if finite else "the velocity is not finite; check the score there"
        raise RuntimeError(
            f"the ODE solver stopped at t = {time:.6g} between {start:.6g} and {end:.6g}: {reason}"
        )


def _rms(x: Tensor) -> Tensor:
    return x.square().mean(1).sqrt()
