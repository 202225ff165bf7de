"""Predictor-corrector sampling (Song et al. 2021, algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from qcsbm_fast.random import NoiseStream
from qcsbm_fast.sampling.conditional import Known
from qcsbm_fast.sampling.correctors import CORRECTORS
from qcsbm_fast.sampling.noise import noisy_step
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
    known: Known | None = None,
    watch: Callable[[int, Tensor], None] | None = None,
    progress: bool = False,
) -> Tensor:
    """Draw samples of shape `size` (batch first), float32 on the stream's device.

    From the prior, `steps` evenly spaced times run from 1 down to `t_min`; at each, `corrector_steps`
    corrector steps come first, then one predictor step. `denoise` leaves out the noise of the very last
    step.

    Args:
        score: one of our scores, or `sde.FunctionScore` of a function.
        predictor: one of `predictors.PREDICTORS` or "none".
        corrector: one of `correctors.CORRECTORS` or "none"; `snr` sets its step.
        stream: all that is random; with a `SampleNoise` and no "langevin" corrector, whose step is a mean
            over the batch, each sample is the same in whatever batch it is drawn.
        known: part of the sample that is given: see `conditional`.
        watch: called with the step, from 0, and the denoised state `(B, *)` after it.
        progress: shows a bar.

    Raises:
        ValueError: for an unknown name, or a predictor that the process does not have.
    """
    _check_name("predictor", predictor, [*PREDICTORS, "none"])
    _check_name("corrector", corrector, [*CORRECTORS, "none"])
    sde, batch = score.sde, size[0]
    x = mean = sde.prior_sample(size, stream)
    times = torch.linspace(1.0, t_min, steps, dtype=torch.float64)
    correct = None if corrector == "none" else CORRECTORS[corrector]

    def impose(x: Tensor, mean: Tensor, time: float) -> tuple[Tensor, Tensor]:
        return known.impose(x, mean, sde, time, stream) if known else (x, mean)

    coefficients = None
    if predictor != "none":
        # (a, b, c) of every step, in float64
        coefficients = torch.stack(PREDICTORS[predictor](sde, times, steps), 1).tolist()
    for step, time in enumerate(tqdm(times.tolist(), desc="sampling", unit="step", disable=not progress)):
        t = x.new_full((batch,), time)
        x, mean = impose(x, mean, time)
        if correct:
            for _ in range(corrector_steps):
                x, mean = impose(*correct(score, x, t, snr=snr, steps=steps, stream=stream), time)
        if coefficients is not None:
            x, mean = noisy_step(x, score(x, t), *coefficients[step], stream)
        if watch:
            watch(step, mean)
    x, mean = impose(x, mean, t_min)
    return mean if denoise else x


def _check_name(argument: str, name: str, known: list[str]) -> None:
    if name not in known:
        raise ValueError(f"{argument}: expected one of {', '.join(known)}, got {name!r}")
