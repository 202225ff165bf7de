"""Samples from a score model, by the sampler that the settings name."""

from __future__ import annotations

import torch
from torch import Tensor

from qcsbm_fast.random import NoiseStream
from qcsbm_fast.sampling.ode import probability_flow
from qcsbm_fast.sampling.pc import predictor_corrector
from qcsbm_fast.score import Score
from qcsbm_fast.train.config import Sampling
from qcsbm_fast.train.errors import RunError


def draw(
    score: Score, shape: torch.Size, sampling: Sampling, stream: NoiseStream, *, progress: bool = False
) -> Tensor:
    """`(count, *shape)` samples of shape `shape`. Raises RunError where the ODE solver fails."""
    size = (sampling.count, *shape)
    if sampling.sampler == "ode":
        try:
            return probability_flow(score, size, rtol=sampling.rtol, atol=sampling.atol, stream=stream)
        except RuntimeError as error:
            raise RunError(f"no samples: {error}") from error
    return predictor_corrector(
        score,
        size,
        steps=sampling.steps,
        corrector=sampling.corrector,
        snr=sampling.snr,
        stream=stream,
        progress=progress,
    )
