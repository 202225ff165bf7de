"""Correctors: Markov steps that leave the law of x_t alone, for a fixed t."""

from __future__ import annotations

from torch import Tensor

from qcsbm_fast import ops
from qcsbm_fast.random import NoiseStream
from qcsbm_fast.sde import ScoreFunction


def langevin(
    score: ScoreFunction, x: Tensor, t: Tensor, *, snr: float, steps: int, stream: NoiseStream
) -> tuple[Tensor, Tensor]:
    """One Langevin step at `x (B, *)`, `t (B,)`: the new x and its mean before the noise.

    The step size is 2 alpha (snr mean||z|| / mean||s||)^2, means over the batch (Song et al. 2021,
    algorithms 4 and 5); alpha is the signal variance that one of the forward chain's `steps` steps keeps: 1
    for VE, 1 - beta_i for VP.
    """
    scale, _ = score.sde.discretize(t, steps)
    return ops.langevin_step(x, score(x, t), snr, (1.0 + scale).square(), stream.draw())
