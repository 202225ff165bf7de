"""Heun's method of order two on a grid of times."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qcsbm_fast.sampling.dormand_prince import Velocity


@torch.no_grad()
def solve(
    velocity: Velocity,
    state: Tensor,
    times: Tensor,
    watch: Callable[[int, Tensor], None] | None = None,
    reached: Callable[[float], None] | None = None,
) -> Tensor:
    """The states `(B, N)` at the last of `times (S + 1,)`, in float64, from `state (B, N)` at the first.

    Two evaluations a step. `watch` is called with each step, from 0, and the state after it, `reached` with its time.
    """
    y = state.double()
    rows = torch.arange(len(y), device=y.device)
    for step, (start, end) in enumerate(zip(times[:-1].tolist(), times[1:].tolist(), strict=True)):
        slope = velocity(y.new_full(rows.shape, start), y, rows)
        ahead = y + (end - start) * slope
        slope = slope + velocity(y.new_full(rows.shape, end), ahead, rows)
        y = y + 0.5 * (end - start) * slope
        if watch:
            watch(step, y)
        if reached:
            reached(end)
    return y
