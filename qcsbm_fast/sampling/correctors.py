"""Correctors: Markov steps that leave the law of x_t alone, for a fixed t.

A corrector maps a score, a batch `x (B, *)` at times `t (B,)` (one time for all), a signal-to-noise ratio and
the number of steps that [0, 1] is cut into to the new x and its mean before the noise. Both take alpha to be
the signal variance that one of the forward chain's `steps` steps keeps: 1 for VE, 1 - beta_i for VP.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from qcsbm_fast import ops
from qcsbm_fast.random import NoiseStream
from qcsbm_fast.sampling.noise import noisy_step
from qcsbm_fast.sde import ScoreFunction


def langevin(
    score: ScoreFunction, x: Tensor, t: Tensor, *, snr: float, steps: int, stream: NoiseStream
) -> tuple[Tensor, Tensor]:
    """One Langevin step of size 2 alpha (snr mean||z|| / mean||s||)^2 (Song et al. 2021, algorithms 4 and 5).

    The means are over the batch, so a sample depends a little on the batch that it is in.
    """
    scale, _ = score.sde.discretize(t, steps)
    return ops.langevin_step(x, score(x, t), snr, (1.0 + scale).square(), stream.draw())


def annealed_langevin(
    score: ScoreFunction, x: Tensor, t: Tensor, *, snr: float, steps: int, stream: NoiseStream
) -> tuple[Tensor, Tensor]:
    """One Langevin step of size 2 alpha (snr std(t))^2, as in annealed Langevin dynamics (Song & Ermon
    2019)."""
    scale, _ = score.sde.discretize(t, steps)
    _, std = score.sde.marginal(t)
    step = 2.0 * (1.0 + scale).double().square() * (snr * std.double()).square()
    return noisy_step(x, score(x, t), 1.0, step, (2.0 * step).sqrt(), stream)


CORRECTORS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "langevin": langevin,
    "annealed-langevin": annealed_langevin,
}
