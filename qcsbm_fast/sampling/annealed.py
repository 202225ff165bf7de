"""Annealed Langevin dynamics over discrete noise levels (Song & Ermon 2019, algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from qcsbm_fast.random import NoiseStream
from qcsbm_fast.sampling.noise import noisy_step
from qcsbm_fast.sde import VE, ScoreFunction


@torch.no_grad()
def annealed_langevin_dynamics(
    score: ScoreFunction,
    size: Sequence[int],
    *,
    stream: NoiseStream,
    levels: int = 10,
    steps_per_level: int = 100,
    eps: float = 2e-5,
    denoise: bool = True,
    watch: Callable[[int, Tensor], None] | None = None,
    progress: bool = False,
) -> Tensor:
    """Draw samples of shape `size` (batch first), float32 on the stream's device, with a variance-exploding
    score.

    From the prior, at each of the geometric levels sigma_1 = sigma_max, ..., sigma_L = sigma_min in turn,
    `steps_per_level` steps

        x' = x + alpha_i / 2 s(x, sigma_i) + sqrt(alpha_i) z,    alpha_i = eps sigma_i^2 / sigma_L^2.

    `denoise` ends with the posterior mean x + sigma_L^2 s. `watch` is called with the level, from 0, and the
    state after it.

    Raises ValueError for another process, fewer than two levels, or an eps outside (0, 4 sigma_L^2), beyond
    which steps grow what they should contract.
    """
    sde = score.sde
    if not isinstance(sde, VE):
        raise ValueError(f"score: expected the variance-exploding process VE, got {type(sde).__name__}")
    if levels < 2:
        raise ValueError(f"levels: expected at least 2, got {levels}")
    largest = 4.0 * sde.sigma_min**2
    if not 0.0 < eps < largest:
        raise ValueError(f"eps: expected 0 < eps < 4 sigma_min^2 = {largest:g}, got {eps:g}")
    x = sde.prior_sample(size, stream)
    times = torch.linspace(1.0, 0.0, levels, dtype=torch.float64)
    alphas = eps * (sde.sigma(times) / sde.sigma_min).square()
    bar = tqdm(times.tolist(), desc="sampling", unit="level", disable=not progress)
    for level, (time, alpha) in enumerate(zip(bar, alphas.tolist(), strict=True)):
        t = x.new_full((len(x),), time)
        for _ in range(steps_per_level):
            x, _ = noisy_step(x, score(x, t), 1.0, 0.5 * alpha, math.sqrt(alpha), stream)
        if watch:
            watch(level, x)
    return x + sde.sigma_min**2 * score(x, x.new_zeros(len(x))) if denoise else x
