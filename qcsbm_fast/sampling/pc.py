"""Predictor-corrector sampling (Song et al. 2021, algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from qcsbm_fast import ops
from qcsbm_fast.random import NoiseStream
from qcsbm_fast.sampling.correctors import langevin
from qcsbm_fast.sampling.predictors import PREDICTORS
from qcsbm_fast.sde import ScoreFunction


@torch.no_grad()
def predictor_corrector(
    score: ScoreFunction,
    size: Sequence[int],
    *,
    steps: int,
    stream: NoiseStream,
    predictor: str = "reverse-diffusion",
    corrector: str = "langevin",
    corrector_steps: int = 1,
    snr: float = 0.16,
    t_min: float = 1e-5,
    denoise: bool = True,
    progress: bool = False,
) -> Tensor:
    """Draw samples of shape `size` (batch first), float32 on the stream's device.

    From the prior, `steps` evenly spaced times run from 1 down to `t_min`; at each, `corrector_steps`
    corrector steps come first, then one predictor step. `denoise` leaves out the noise of the very last
    step. `predictor` is one of `predictors.PREDICTORS` or "none", `corrector` is "langevin" (with
    signal-to-noise ratio `snr`) or "none". Nothing is drawn but from `stream`; `progress` shows a bar.

    Raises ValueError for an unknown name, or a predictor that the process does not have.
    """
    _check_name("predictor", predictor, [*PREDICTORS, "none"])
    _check_name("corrector", corrector, ["langevin", "none"])
    sde, batch = score.sde, size[0]
    x = mean = sde.prior_sample(size, stream)
    times = torch.linspace(1.0, t_min, steps, dtype=torch.float64)
    coefficients = None
    if predictor != "none":
        # (a, b, c) of every step, in float64
        coefficients = torch.stack(PREDICTORS[predictor](sde, times, steps), 1).tolist()
    for step, time in enumerate(tqdm(times.tolist(), desc="sampling", unit="step", disable=not progress)):
        t = x.new_full((batch,), time)
        if corrector != "none":
            for _ in range(corrector_steps):
                x, mean = langevin(score, x, t, snr=snr, steps=steps, stream=stream)
        if coefficients is not None:
            x, mean = ops.sde_step(x, score(x, t), *coefficients[step], stream.draw())
    return mean if denoise else x


def _check_name(argument: str, name: str, known: list[str]) -> None:
    if name not in known:
        raise ValueError(f"{argument}: expected one of {', '.join(known)}, got {name!r}")
