"""Measurements of a score model on held-out data."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qcsbm_fast.metrics.levels import NAMES, measure_level
from qcsbm_fast.random import NoiseStream
from qcsbm_fast.score import Score
from qcsbm_fast.train.distributed import Processes

_BATCH = 1000


class Estimate(NamedTuple):
    """A mean and its standard error."""

    mean: float
    error: float


@torch.no_grad()
def measure(
    score: Score,
    x0: Tensor,
    stream: NoiseStream,
    *,
    levels: int,
    probes: int,
    exact: bool,
    half: bool,
    batch_size: int = _BATCH,
    processes: Processes = Processes(),  # noqa: B008  it does not change
) -> tuple[Tensor, Tensor]:
    """Times `(L,)`, the midpoints of L equal parts of [0, 1], and at each the `NAMES` of each of `x0 (N, *)`.

    The latter are `(3, L, N)`, as `metrics.levels.measure_level` defines them. Of several `processes`, which all
    call this, each works off its share of the samples.
    """
    times = (torch.arange(levels, device=x0.device) + 0.5) / levels
    mine = slice(processes.rank, None, processes.world)
    batches = [
        torch.stack(
            [
                measure_level(score, part, time, stream, probes=probes, exact=exact, half=half, mine=mine)
                for time in times
            ],
            1,
        )
        for part in x0.split(batch_size)
    ]
    return times, processes.sum(torch.cat(batches, 2))


def over_levels(values: Tensor) -> dict[str, Estimate]:
    """Means over levels and samples of what `measure` gives, N at least 2.

    The standard errors are those of the samples' own means over the levels, since a sample's levels go together.
    """
    values = values.mean(1)
    errors = values.std(1) / values.shape[1] ** 0.5
    rows = zip(NAMES, values.mean(1).tolist(), errors.tolist(), strict=True)
    return {name: Estimate(mean, error) for name, mean, error in rows}


def evaluate(score: Score, x0: Tensor, stream: NoiseStream, **settings: Any) -> dict[str, float]:
    """`over_levels` as plain numbers called `test_<name>`, with their standard errors (`test_<name>_error`).

    Arguments as `measure`.
    """
    _, values = measure(score, x0, stream, **settings)
    found = over_levels(values)
    return {f"test_{name}": value.mean for name, value in found.items()} | {
        f"test_{name}_error": value.error for name, value in found.items()
    }
