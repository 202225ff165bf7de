"""Samples from a score model, by the sampler that the settings name."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qcsbm_fast.random import NoiseStream
from qcsbm_fast.sampling.ode import probability_flow
from qcsbm_fast.sampling.pc import predictor_corrector
from qcsbm_fast.score import Score
from qcsbm_fast.train.config import Sampling
from qcsbm_fast.train.errors import RunError


def draw(
    score: Score,
    shape: torch.Size,
    sampling: Sampling,
    stream: NoiseStream,
    *,
    count: int | None = None,
    progress: bool = False,
    watch: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """`(count, *shape)` samples, by default as many as the settings say; `watch` as the sampler's.

    Raises RunError where the settings do not fit the process or the ODE solver fails.
    """
    size = (sampling.count if count is None else count, *shape)
    try:
        if sampling.sampler == "pc":
            return predictor_corrector(
                score,
                size,
                steps=sampling.steps,
                predictor=sampling.predictor,
                corrector=sampling.corrector,
                corrector_steps=sampling.corrector_steps,
                snr=sampling.snr,
                stream=stream,
                cuda_graph=sampling.cuda_graph,
                progress=progress,
                watch=watch,
            )
        return probability_flow(
            score,
            size,
            rtol=sampling.rtol,
            atol=sampling.atol,
            steps=sampling.steps if sampling.sampler == "heun" else None,
            stream=stream,
            watch=watch,
            progress=progress,
        )
    except (RuntimeError, ValueError) as error:
        raise RunError(f"no samples: {error}") from error
