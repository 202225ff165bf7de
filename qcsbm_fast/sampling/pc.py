"""Predictor-corrector sampling (Song et al. 2021, algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from qcsbm_fast.cuda_graph import Choice, Replayed, wanted
from qcsbm_fast.random import NoiseStream
from qcsbm_fast.sampling.casts import kept_casts
from qcsbm_fast.sampling.conditional import Known
from qcsbm_fast.sampling.correctors import CORRECTORS
from qcsbm_fast.sampling.noise import noisy_step
from qcsbm_fast.sampling.predictors import PREDICTORS
from qcsbm_fast.sde import ScoreFunction


@torch.no_grad()
@kept_casts()
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
    cuda_graph: Choice = "auto",
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
        cuda_graph: "auto" captures a step on a GPU, all its network calls included, and replays it for the others;
            "on" insists. Not with `known`.

    Raises:
        ValueError: for an unknown name, a predictor that the process does not have, or "on" where that cannot be.
    """
    _check_name("predictor", predictor, [*PREDICTORS, "none"])
    _check_name("corrector", corrector, [*CORRECTORS, "none"])
    sde, batch = score.sde, size[0]
    x = mean = sde.prior_sample(size, stream)
    obstacle = None if x.is_cuda else f"that needs an NVIDIA GPU and these samples are on {x.device}"
    graph = wanted(cuda_graph, "known has numbers of the host in every step" if known else obstacle)
    times = torch.linspace(1.0, t_min, steps, dtype=torch.float64)
    correct = None if corrector == "none" else CORRECTORS[corrector]

    def impose(x: Tensor, mean: Tensor, time: float) -> tuple[Tensor, Tensor]:
        return known.impose(x, mean, sde, time, stream) if known else (x, mean)

    def advance(
        x: Tensor, mean: Tensor, t: Tensor, coefficients: Sequence[float | Tensor], time: float = math.nan
    ) -> tuple[Tensor, Tensor]:
        """One step from times `t (B,)`; `time` is their value, for `known`."""
        x, mean = impose(x, mean, time)
        if correct:
            for _ in range(corrector_steps):
                x, mean = impose(*correct(score, x, t, snr=snr, steps=steps, stream=stream), time)
        if coefficients:
            a, b, c = coefficients
            x, mean = noisy_step(x, score(x, t), a, b, c, stream)
        return x, mean

    # t and (a, b, c) of every step, in float64
    rows = [times] if predictor == "none" else [times, *PREDICTORS[predictor](sde, times, steps)]
    table = torch.stack(rows, 1)
    take = _Captured(advance, x, table) if graph else None
    bar = tqdm(table.tolist(), desc="sampling", unit="step", disable=not progress)
    for step, (time, *coefficients) in enumerate(bar):
        if take:
            x, mean = take()
        else:
            x, mean = advance(x, mean, x.new_full((batch,), time), coefficients, time)
        if watch:
            watch(step, mean.clone() if graph else mean)
    x, mean = impose(x, mean, t_min)
    return mean if denoise else x


class _Captured:
    """The steps of a sampler as one CUDA graph, which reads its row of the `table (steps, 1 or 4)` on the device.

    Every call returns the same two tensors, the state and its mean after one more step, changed in place.
    """

    def __init__(self, advance: Callable[..., tuple[Tensor, Tensor]], x: Tensor, table: Tensor) -> None:
        self._advance = advance
        self._state = x, x.clone()
        self._table = table.to(x.device, x.dtype)
        self._next = torch.zeros(1, dtype=torch.int64, device=x.device)
        self._take = Replayed(self._step, x.device)

    def __call__(self) -> tuple[Tensor, Tensor]:
        self._take()
        return self._state

    def _step(self) -> None:
        t, *coefficients = self._table.index_select(0, self._next).expand(len(self._state[0]), -1).unbind(1)
        self._next.add_(1)
        for kept, value in zip(self._state, self._advance(*self._state, t, coefficients), strict=True):
            kept.copy_(value)


def _check_name(argument: str, name: str, known: list[str]) -> None:
    if name not in known:
        raise ValueError(f"{argument}: expected one of {', '.join(known)}, got {name!r}")
