"""The probability-flow ODE (Song et al. 2021, section 4.3), in the coordinates in which it is smooth.

With x_t | x_0 ~ N(m x_0, std^2 I), y = x / m and l = log(std / m), the flow dx/dt = f x - g^2 s / 2 of every
process is

    dy/dl = -(std^2 / m) s(m y, t(l)):

no drift is left, and in l the velocity changes evenly where in t it would in a burst near 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from qcsbm_fast.ops.registry import per_row
from qcsbm_fast.random import NoiseStream
from qcsbm_fast.sampling import dormand_prince, heun
from qcsbm_fast.sampling.casts import kept_casts
from qcsbm_fast.sampling.progress import log_noise_bar
from qcsbm_fast.sde import SDE, ScoreFunction

_FRAMES = 32


@torch.no_grad()
@kept_casts()
def probability_flow(
    score: ScoreFunction,
    size: Sequence[int],
    *,
    stream: NoiseStream,
    rtol: float = 1e-3,
    atol: float = 1e-5,
    steps: int | None = None,
    t_min: float = 1e-5,
    denoise: bool = True,
    watch: Callable[[int, Tensor], None] | None = None,
    progress: bool = False,
) -> Tensor:
    """Draw samples of shape `size` (batch first), float32 on the stream's device.

    The ODE runs from the prior at t = 1 to `t_min`, the network in float32: by Dormand and Prince's method,
    each sample with steps of its own to the tolerances `rtol` and `atol` on y, or in `steps` steps of Heun's,
    even in l. `denoise` ends with the posterior mean of x_0 at t_min, (x + std^2 s) / m (Tweedie's formula).
    `watch` is called with a number, from 0, and the state x / m on the way. `progress` shows a bar of the log-noise
    that the slowest sample has covered.

    Raises:
        ValueError: where std is 0 at t_min.
        RuntimeError: where the solver fails.
    """
    sde = score.sde
    prior = sde.prior_sample(size, stream)

    def velocity(noise: Tensor, state: Tensor, _: Tensor) -> Tensor:
        t, mean, std = levels(sde, noise)
        x = (per_row(mean, state) * state).to(prior.dtype).view(-1, *prior.shape[1:])
        s = score(x, t.to(x.dtype)).flatten(1).double()
        return -per_row(std.square() / mean, s) * s

    def show(frame: int, state: Tensor) -> None:
        if watch:
            watch(frame, state.to(prior.dtype).view(prior.shape))

    start, end = log_noise(sde, 1.0), log_noise(sde, t_min)
    y = prior.double().flatten(1) / scale_at(sde, 1.0)
    with log_noise_bar(start, end, name="sampling", shown=progress) as reached:
        if steps is not None:
            times = torch.linspace(start, end, steps + 1, dtype=torch.float64)
            y = heun.solve(velocity, y, times, show, reached)
        else:
            cuts = torch.linspace(start, end, _FRAMES + 1 if watch else 2, dtype=torch.float64).tolist()
            for frame, (here, there) in enumerate(pairwise(cuts)):
                y = dormand_prince.solve(velocity, y, here, there, rtol=rtol, atol=atol, reached=reached)
                show(frame, y)
    x = (y * scale_at(sde, t_min)).to(prior.dtype).view(prior.shape)
    if denoise:
        t = x.new_full((len(x),), t_min)
        mean, std = sde.marginal(t)
        x = (x + per_row(std, x).square() * score(x, t)) / per_row(mean, x)
    return x


def levels(sde: SDE, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`(t, m, std)`, each `(B,)`, where log(std / m) is `noise (B,)`."""
    ratio = noise.exp()
    t = sde.time_of_ratio(ratio)
    mean = sde.log_mean(t).exp()
    return t, mean, ratio * mean


def log_noise(sde: SDE, time: float) -> float:
    """log(std / m) at `time`. Raises ValueError where std is 0."""
    mean, std = sde.marginal(torch.tensor([time], dtype=torch.float64))
    if not std > 0:
        raise ValueError(f"t_min: expected a time with noise, got {time}, where std is 0; take 1e-5")
    return math.log(float(std / mean))


def scale_at(sde: SDE, time: float) -> float:
    """m at `time`."""
    return float(sde.log_mean(torch.tensor([time], dtype=torch.float64)).exp())
