"""One Langevin step whose size is set by a signal-to-noise ratio (Song et al. 2021, algorithms 4 and 5).

    step_b = 2 alpha_b (snr N / S)^2,   x' = x + step s + sqrt(2 step) z,

`N` and `S` the batch means of the norms `||z_b||` and `||s_b||`. A score that is zero everywhere has no
direction to step in: the step is then zero (the formula's limit is infinite) and `x' = mean = x`. A NaN in
the score makes the whole batch NaN; an infinity makes its own element NaN and the step zero elsewhere.

Norms are summed in float64 over fixed pieces (on a GPU in float32 within a piece), so that the result does not
depend on the number of threads; the rest is computed in float32 (float64 for float64), with the float32-valued
`z` of `philox_normal`, drawn twice and never stored. Error below 2e-7 of the largest value (in float64 too), in
bfloat16 its rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .check import batched, fail, like, noise_state, per_sample
from .philox import normal
from .registry import Op, accumulate_dtype, per_row, rows


def _mean_norm(x: Tensor) -> Tensor:
    return rows(x).double().norm(dim=1).mean()


def _reference(x: Tensor, score: Tensor, snr: float, alpha: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    dtype = accumulate_dtype(x.dtype)
    z = normal(state, x.shape, dtype)
    score_norm = _mean_norm(score)
    step = 2 * alpha.double() * (snr * _mean_norm(z) / score_norm).square()
    step = torch.where(score_norm == 0, 0.0, step)
    mean = x + per_row(step.to(dtype), x) * score
    noise = per_row((2 * step).sqrt().to(dtype), x) * z
    return (mean + noise).to(x.dtype), mean.to(x.dtype)


_op = Op(
    "langevin_step(Tensor x, Tensor score, float snr, Tensor alpha, Tensor state) -> (Tensor, Tensor)",
    _reference,
)
_op.set_triton("langevin_step")


def langevin_step(
    x: Tensor, score: Tensor, snr: float, alpha: Tensor | float, state: Tensor
) -> tuple[Tensor, Tensor]:
    """`(x', mean)`, both `(B, *)`, of one Langevin step; not differentiable.

    Args:
        x: `(B, *)`, any floating dtype.
        score: shape, dtype and device of `x`.
        snr: ratio of the norms of the steps along score and noise, non-negative.
        alpha: `(B,)` or one number, the step's scale (1 for VE).
        state: int64 `(2,)`, as `NoiseStream.draw()` returns it.

    Raises:
        ValueError, TypeError: naming the argument, for a wrong shape, dtype or device, or a negative `snr`.
    """
    x = batched("langevin_step", "x", x)
    score = like("langevin_step", "score", score, x)
    if not snr >= 0:
        fail("langevin_step", "snr", "a non-negative number", snr)
    alpha = per_sample("langevin_step", "alpha", alpha, x)
    return _op(x, score, float(snr), alpha, noise_state("langevin_step", state, x.device))
