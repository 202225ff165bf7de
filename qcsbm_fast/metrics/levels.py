"""Noised data, level by level and batch by batch, for the metrics that average over noise levels."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from qcsbm_fast import ops
from qcsbm_fast.random import NoiseStream
from qcsbm_fast.sde import SDE


def noised_batches(
    sde: SDE, x0: Tensor, time: Tensor, stream: NoiseStream, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield `(x_t (b, *), t (b,))` with x_t drawn given each sample of `x0 (N, *)` at the one `time ()`."""
    for batch in x0.split(batch_size):
        t = time.to(batch).repeat(len(batch))
        mean, std = sde.marginal(t)
        yield ops.perturb(batch, mean, std, stream.draw(), store_noise=False)[0], t
